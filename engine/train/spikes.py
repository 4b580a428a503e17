"""Loss spikes: a loss far above those before it, seen before the update that it would cause.

With mean m and standard deviation s of the losses of the last `spike.window` steps, a loss above
m + `spike.threshold` * s is a spike; before so many steps nothing is. The losses looked at are part of a checkpoint, so
that a continued run sees the spikes that an uninterrupted one sees.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from trine.engine.errors import LossSpikeError
from trine.engine.train.recipe import SpikeSettings


class LossWatch:
    """Holds the losses of the last steps, oldest first in `recent`; with `spike.action = "off"` none."""

    def __init__(self, settings: SpikeSettings, recent: Iterable[float] = ()) -> None:
        self._settings = settings
        self.recent: deque[float] = deque(recent, maxlen=settings.window if settings.action != "off" else 0)

    def check(self, loss: float, *, step: int) -> None:
        """Take the loss of a step. Raises `LossSpikeError` where it is a spike, which is then not taken."""
        settings = self._settings
        if settings.action != "off" and len(self.recent) == settings.window:
            mean, deviation = statistics.fmean(self.recent), statistics.pstdev(self.recent)
            if loss > mean + settings.threshold * deviation:
                raise LossSpikeError(
                    f"the loss of step {step} is {loss:.4g}, the mean of the {settings.window} before it {mean:.4g} "
                    f"with a standard deviation of {deviation:.2g}: a spike by spike.threshold = {settings.threshold:g}"
                )
        self.recent.append(loss)
