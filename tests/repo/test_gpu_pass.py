"""The script of `make gpu`, where there is no GPU: its CPU part, and what it says when something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trine.benchmarks import gpu_pass

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m trine.benchmarks.gpu_pass` as on a machine where Trine is not installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), **variables}
    command = [sys.executable, "-m", "trine.benchmarks.gpu_pass", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_cpu_agrees_with_itself() -> None:
    done = run("--device", "cpu", "--steps", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^(ok|FAIL) +(.+?)  ", done.stdout, re.MULTILINE)
    assert [check for _, check in table] == [
        "trine doctor",
        "tests/gpu",
        "loss falls",
        "float32 losses",
        "bfloat16 losses",
        "two runs, same bits",
        "greedy tokens",
    ]
    assert {result for result, _ in table} == {"ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert re.fullmatch(r"gpu_pass: device 'cuda': .+; use device=cpu\n", done.stderr)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_pass, "NEEDED", ("torch", "no_such_package", "nor_this"))
    monkeypatch.setattr(sys, "argv", ["gpu_pass"])
    assert gpu_pass.main() == 1
    assert (
        capsys.readouterr().err
        == "gpu_pass: not installed here: no_such_package, nor_this; install them and run again\n"
    )


def test_a_difference_beyond_the_tolerance_fails_its_row() -> None:
    assert gpu_pass._losses("losses", [1.0, 2.0], [1.0, 2.0001], 1e-3).good
    assert not gpu_pass._losses("losses", [1.0, 2.0], [1.0, 2.01], 1e-3).good
    assert not gpu_pass._losses("losses", [1.0, float("nan")], [1.0, 2.0], 1e-3).good
