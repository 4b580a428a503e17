"""Energy of a run: joules by the machine's own counters, and what they stand for in CO2e.

What is assumed, and said beside every figure: the counters see the whole chip, so other programs on it count too; what
has no counter (disks, fans, power supplies, cooling) is left out; CO2e is joules times `energy.carbon_intensity`, in
grams per kilowatt-hour, by default the world's mean of 2024 (Ember, Global Electricity Review 2025), life cycle of the
power stations included. Energy is counted while a run is in progress, evaluations and checkpoints included; what was
spent on steps that were rolled back stays spent, and what was spent since the last checkpoint before a kill is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trine.engine.log import warn
from trine.engine.train.energy_counters import Counters

JOULES_PER_KWH = 3.6e6
# A GPU's driver takes milliseconds to answer, as long as a step of a small model: steps do not ask more often.
_PERIOD_SECONDS = 1.0


@dataclass
class EnergyMeter:
    """Joules so far, over all parts of a run.

    joules: measured ones. measured_seconds: how long counters were read. seconds: how long the run took in all.
    """

    counters: Counters
    joules: float = 0.0
    measured_seconds: float = 0.0
    seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _last: list[float] = field(default_factory=list)
    _read_at: float = 0.0

    def start(self) -> None:
        """The run begins, or goes on."""
        self._last = self._read()
        self._read_at = self.clock()

    def keep_up(self) -> None:
        """After a step: take what was spent, where the last reading is a second old."""
        if self.clock() - self._read_at >= _PERIOD_SECONDS:
            self.update()

    def update(self) -> None:
        """Take what was spent since the last reading: before the figures are used, and after every pause."""
        now = self.clock()
        gone, self._read_at = now - self._read_at, now
        self.seconds += gone
        before, self._last = self._last, self._read()
        if not self._last:
            return
        spent = sum(self._last) - sum(before)
        if gone <= min(counter.safe_seconds for counter in self.counters.found):  # else one may have gone round twice
            self.joules += spent
            self.measured_seconds += gone

    def _read(self) -> list[float]:
        try:
            return [counter.read() for counter in self.counters.found]
        except (OSError, ValueError) as error:
            warn(f"the energy counters cannot be read any more ({error}); the run goes on without")
            self.counters = Counters([], [*self.counters.uncounted, f"the counters stopped to answer ({error})"])
            return []

    @property
    def known(self) -> float | None:
        """Joules, or None where nothing could be measured."""
        return self.joules if self.measured_seconds else None

    @property
    def state(self) -> tuple[float, float, float]:
        """What a checkpoint keeps."""
        return self.joules, self.measured_seconds, self.seconds

    def load_state(self, state: tuple[float, float, float]) -> None:
        """Go on from a checkpoint."""
        self.joules, self.measured_seconds, self.seconds = state

    def summary(self, carbon_intensity: float) -> dict[str, Any]:
        """The `energy` of the `end` line, as JSON values."""
        joules = self.known
        return {
            "joules": joules,
            "co2e_grams": None if joules is None else co2e_grams(joules, carbon_intensity),
            "carbon_intensity": carbon_intensity,
            "measured_seconds": self.measured_seconds,
            "seconds": self.seconds,
            "counted": [counter.name for counter in self.counters.found],
            "uncounted": self.counters.uncounted,
        }


def co2e_grams(joules: float, carbon_intensity: float) -> float:
    """Grams of CO2e at `carbon_intensity` grams per kWh."""
    return joules / JOULES_PER_KWH * carbon_intensity


def format_energy(joules: float) -> str:
    """`850 J`, `12.3 kJ`, `4.56 kWh`."""
    if joules >= JOULES_PER_KWH:
        return f"{joules / JOULES_PER_KWH:.3g} kWh"
    return f"{joules / 1000:.3g} kJ" if joules >= 1000 else f"{joules:.3g} J"


def format_mass(grams: float) -> str:
    """`0.12 g`, `34 g`, `1.2 kg`."""
    return f"{grams / 1000:.3g} kg" if grams >= 1000 else f"{grams:.2g} g" if grams < 10 else f"{grams:.3g} g"


def energy_line(summary: dict[str, Any]) -> str:
    """A summary in one sentence, for the screen and the model card."""
    joules = summary["joules"]
    if joules is None:
        return f"energy unknown: {'; '.join(summary['uncounted']) or 'nothing was measured'}"
    share = summary["measured_seconds"] / summary["seconds"] if summary["seconds"] else 1.0
    part = "" if share > 0.995 else f", measured over {share:.0%} of the time"
    missing = f"; not counted: {'; '.join(summary['uncounted'])}" if summary["uncounted"] else ""
    return (
        f"energy {format_energy(joules)} by the counters of {', '.join(summary['counted'])}{part}: "
        f"{format_mass(summary['co2e_grams'])} CO2e at {summary['carbon_intensity']:g} g/kWh{missing}"
    )
