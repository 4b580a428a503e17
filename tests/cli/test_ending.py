"""Signals end a command also where Python code is called from C, which lets no exception through."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

import pytest

from trine.cli.ending import ended_by_signals


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_that_meets_a_function_called_from_c_is_not_lost(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    # A process that was started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm = signal.getsignal(signal.SIGALRM)

    @ctypes.CFUNCTYPE(None)
    def called_from_c() -> None:
        signal.raise_signal(number)

    def work() -> None:
        called_from_c()
        time.sleep(60)

    try:
        with pytest.raises(raised) as found, ended_by_signals():
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGALRM) is alarm
    if isinstance(found.value, SystemExit):
        assert found.value.code == 143


def test_other_exceptions_of_such_functions_are_reported_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(what.exc_type))

    @ctypes.CFUNCTYPE(None)
    def called_from_c() -> None:
        raise ValueError

    with ended_by_signals():
        called_from_c()
    assert seen == [ValueError]
