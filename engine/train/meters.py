"""What is measured while training: time, rate, smoothed loss, memory.

Only steps count as training time: evaluations, samples and checkpoints lie outside the stopwatch, so tokens per second
and MFU say how fast training is, and the time left is computed from both. The clock is passed in, for tests.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

RATE_WINDOW = 20
LOSS_DECAY = 0.95


@dataclass
class SmoothedLoss:
    """Exponential moving average of the loss, debiased as in Adam so that early values are right."""

    total: float = 0.0
    weight: float = 0.0

    def update(self, loss: float) -> None:
        self.total = LOSS_DECAY * self.total + (1 - LOSS_DECAY) * loss
        self.weight = LOSS_DECAY * self.weight + (1 - LOSS_DECAY)

    @property
    def value(self) -> float:
        """The average; NaN before the first loss."""
        return self.total / self.weight if self.weight else float("nan")


@dataclass
class Meter:
    """Training seconds and tokens. `seconds` and `tokens` are cumulative over resumes; rates are of the last steps.

    `flops_per_token` and `peak_flops` (None where unknown) give the model FLOPs utilisation.
    """

    flops_per_token: int
    peak_flops: float | None
    seconds: float = 0.0
    tokens: int = 0
    clock: Callable[[], float] = time.perf_counter
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))
    _pauses: float = 0.0
    _started: float = 0.0
    _last: float = 0.0

    def start(self) -> None:
        """The first step is about to begin."""
        self._started = self._last = self.clock()

    def end_step(self, *, tokens: int, processed: int) -> None:
        """A step ended: `tokens` valid targets were trained, `processed` tokens went through the model."""
        now = self.clock()
        self.seconds += now - self._last
        self.tokens += tokens
        self._recent.append((now - self._last, processed))
        self._last = now

    def end_pause(self) -> float:
        """Something that is no training ended (evaluation, checkpoint); returns the seconds it took."""
        now = self.clock()
        pause, self._last = now - self._last, now
        self._pauses += pause
        return pause

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model per second over the last steps."""
        seconds = sum(duration for duration, _ in self._recent)
        return sum(count for _, count in self._recent) / seconds if seconds > 0 else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: FLOPs done (convention of engine/model/cost.py) over the peak."""
        return None if self.peak_flops is None else self.tokens_per_second * self.flops_per_token / self.peak_flops

    def seconds_left(self, *, steps_done: int, steps_left: int) -> float:
        """Time to the end at the pace so far in this process, pauses included."""
        recent = [duration for duration, _ in self._recent]
        if not recent:
            return 0.0
        return steps_left * (sum(recent) / len(recent) + self._pauses / max(1, steps_done))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
