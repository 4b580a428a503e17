"""`trine quickstart` as a command, on this machine's own library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Trine = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_quickstart_ends_with_results_and_what_it_suggests_works(trine: Trine, tmp_path: Path) -> None:
    out = tmp_path / "quick start"  # a space, to see the suggested commands quoted
    status, shown, complaints = trine("quickstart", "--out", out, "--steps", "3")
    assert status == 0, complaints
    for part in ("def read_lines(path):", "class Stack:", "held-out files: loss", "bits per byte", "report.html"):
        assert part in shown
    assert f"trine generate '{out}'" in shown
    status, shown, complaints = trine("quickstart", "--out", out)
    assert status == 0, complaints
    assert "has finished before; to start afresh" in shown
    status, shown, complaints = trine("generate", out, "--prompt", "def main():", "--max-tokens", "4")
    assert status == 0, complaints


@pytest.mark.slow
def test_quickstart_ends_by_serving_and_the_lines_it_prints_work(tmp_path: Path) -> None:
    out = tmp_path / "quick start"
    command = [
        sys.executable,
        "-m",
        "trine.cli",
        "quickstart",
        "--out",
        str(out),
        "--steps",
        "3",
        "--serve",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            shown = ""
            while "print(client" not in shown:
                line = process.stdout.readline()
                assert line, f"it ended with {process.wait()}"
                shown += line
            assert f"trine serve '{out}'" in shown
            (curl,) = (line for line in shown.splitlines() if line.startswith("curl "))
            done = subprocess.run(["sh", "-c", f"{curl} --silent"], capture_output=True, text=True, check=True)
            assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0
            snippet = shown[shown.index("from openai") :]
            done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
            assert done.stdout.strip()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("steps", ["0", "many"])
def test_impossible_steps_are_refused_and_nothing_is_written(trine: Trine, tmp_path: Path, steps: str) -> None:
    status, shown, complaints = trine("quickstart", "--out", tmp_path / "run", "--steps", steps)
    assert (status, shown) == (2, "")
    assert steps in complaints
    assert not (tmp_path / "run").exists()
