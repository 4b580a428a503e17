"""Being asked to stop: SIGINT (Ctrl-C) and SIGTERM end a run after the step at hand, with everything saved.

The first signal only sets a flag that the loop looks at between steps; the second one ends the run at once
(KeyboardInterrupt), but for a checkpoint that is on its way to the disk; a third does not wait for that either. The
last checkpoint is untouched in any case, since checkpoints are written aside and renamed.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from trine.engine.log import say


class StopRequest:
    """Context manager that catches the two signals while it is open; `requested` tells whether one came.

    Outside the main thread, where Python delivers no signals, it only ever says no.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say(f"\n{signal.Signals(number).name} received: finishing this step, then saving (again to stop at once)")
