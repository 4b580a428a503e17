"""Progress by bytes: lines in a log, a bar on a terminal."""

from __future__ import annotations

import pytest

from trine.engine.data import progress
from trine.engine.data.progress import ByteProgress


def test_lines_tell_share_rate_and_time_left() -> None:
    meter = ByteProgress(100 << 20, what="preparing")
    assert meter.line(25 << 20, 5.0) == "preparing: 25% (25.0 MiB of 100.0 MiB), 5.0 MiB/s, 15.0 s left"


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with ByteProgress(1000, what="x") as meter:
        for position in (100, 200, 300, 400):
            meter.update(position, tokens=10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["20%", "40%"]
    assert "40 tokens" in lines[1]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    with ByteProgress(1000, what="reading") as meter:
        meter.update(500)
    capsys.readouterr()
