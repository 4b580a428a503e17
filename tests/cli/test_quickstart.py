"""`trine quickstart` as a command, on this machine's own library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def trine_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = "from trine.cli.main import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_quickstart_ends_with_results_and_what_it_suggests_works(tmp_path: Path) -> None:
    out = tmp_path / "quick start"  # a space, to see the suggested commands quoted
    done = trine_command("quickstart", "--out", out, "--steps", "3")
    assert done.returncode == 0, done.stderr
    for shown in ("def read_lines(path):", "class Stack:", "held-out files: loss", "bits per byte", "report.html"):
        assert shown in done.stdout
    assert f"trine generate '{out}'" in done.stdout
    again = trine_command("quickstart", "--out", out)
    assert again.returncode == 0, again.stderr
    assert "has finished before; to start afresh" in again.stdout
    generated = trine_command("generate", out, "--prompt", "def main():", "--max-tokens", "4")
    assert generated.returncode == 0, generated.stderr


def test_bad_values_are_one_line_and_status_2(tmp_path: Path) -> None:
    for arguments in (["--steps", "0"], ["--steps", "many"]):
        done = trine_command("quickstart", "--out", tmp_path / "run", *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
