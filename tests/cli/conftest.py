"""The command line, run in the test's process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from trine.cli.main import main

Trine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trine:
    """`trine("eval", folder, ...)`: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trine", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        status = stop.value.code or 0
        assert isinstance(status, int)
        return status, captured.out, captured.err

    return run


@pytest.fixture
def succeeds(trine: Trine) -> Callable[..., str]:
    """`succeeds("data", ...)`: what it printed, stderr included, once its exit status was 0."""

    def run(*arguments: object) -> str:
        status, out, err = trine(*arguments)
        assert status == 0, err
        return out + err

    return run
