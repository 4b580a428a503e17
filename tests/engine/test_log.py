"""Messages to the person at the terminal."""

from __future__ import annotations

import pytest

from trine.engine import log


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0.1, []),
        (0.5, [4, 8, 12, 16, 20]),
        (1.0, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (5.0, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
    ],
)
def test_lines_of_progress_come_at_tenths_but_not_in_quick_succession(
    seconds: float, lines: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("trine.engine.log.time.monotonic", lambda: now)
    monkeypatch.setattr(log, "is_terminal", lambda: False)
    for _ in log.progress(range(20), total=20, what="work"):
        now += seconds
    expected = [f"work: {done}/20, {log.format_duration((20 - done) * seconds)} left" for done in lines]
    assert capsys.readouterr().err.splitlines() == expected
