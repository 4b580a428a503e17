"""Ending a command by a signal, so that what is under a hidden name is removed and what can be continued is said."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

# Until an exception that was lost is raised again.
_SECONDS = 0.05


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit(143), as Ctrl-C raises KeyboardInterrupt, and neither is lost.

    An exception does not leave a function that is called from C (Numba's compiler calls such ones for seconds): Python
    reports it as one that cannot be raised, and goes on. One of these two is raised again, until it gets through.
    """
    before, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    alarm = signal.getsignal(signal.SIGALRM)

    def lost(what: Any) -> None:
        in_main = threading.current_thread() is threading.main_thread()  # the only one that signals interrupt
        if not in_main or not issubclass(what.exc_type, (KeyboardInterrupt, SystemExit)):
            hook(what)
            return
        signal.signal(signal.SIGALRM, _interrupt if what.exc_type is KeyboardInterrupt else _terminate_late)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)

    sys.unraisablehook = lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _terminate_late(number: int, frame: FrameType | None) -> NoReturn:
    _terminate(signal.SIGTERM, frame)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
