"""Every error ends as one line and an exit status; tracebacks only with --debug."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys

import pytest

from trine.cli import main
from trine.cli.__main__ import main as start
from trine.engine.errors import CheckpointError, UsageError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, raises: BaseException | None = None) -> int:
    """The exit status of `trine ARGUMENTS`; with `raises`, the application itself is replaced by that error."""

    def fail(arguments: list[str], **_: object) -> None:
        assert raises is not None
        raise raises

    if raises is not None:
        monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["trine", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    status = stop.value.code
    return status if isinstance(status, int) else 0


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("width = 7 is odd; give an even width"), 2, "trine: width = 7 is odd; give an even width\n"),
        (CheckpointError("no checkpoint at x"), 1, "trine: no checkpoint at x\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "trine: a.txt: No such file or directory\n"),
        (OSError(28, "No space left on device"), 1, "trine: cannot write the result (No space left on device); make"),
        (OSError(30, "Read-only file system", "out/.writing-q"), 1, "trine: cannot write out (Read-only file system);"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "'torch' is not installed"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: Exception, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, raises=error) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert line in shown.err
    assert shown.err.count("\n") == 1


def test_interruption_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, raises=KeyboardInterrupt()) == 130


def test_interruption_while_it_is_being_imported_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupts:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "trine.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "trine.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 130


def test_sigterm_unwinds_as_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(arguments: list[str], **_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(main, "app", end)
    assert run(monkeypatch) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_goes_away_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", "trine.cli", "--help"], stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_debug_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "app", lambda arguments, **_: 1 / len(arguments))
    monkeypatch.setattr(sys, "argv", ["trine", "--debug"])
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"trine {importlib.metadata.version('trine')}\n"


def test_the_list_of_commands_is_cut_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "--help") == 0
    commands = capsys.readouterr().out.partition("Commands:")[2]
    assert "doctor" in commands
    assert "..." not in commands


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("train",), "trine: Missing argument 'RECIPE.toml'; see `trine train --help`"),
        (("doctr",), "trine: No such command 'doctr'. Did you mean 'doctor'? See `trine --help`"),
        (("report", "x", "--fulness"), "trine: No such option: --fulness; see `trine report --help`"),
        (
            ("tokenizer", "train", "x", "--out", "y", "--kind", "bert"),
            "trine: Invalid value for '--kind': 'bert' is not one of 'bpe', 'unigram', 'wordpiece', 'char'; "
            "see `trine tokenizer train --help`",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_value_of_the_wrong_type_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "generate", "x", "--prompt", "p", "--temperature", "warm") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("trine: Invalid value for '--temperature'")
    assert "'warm'" in shown
    assert shown.count("\n") == 1
