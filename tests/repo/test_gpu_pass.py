"""The script of `make gpu`, where there is no GPU: its CPU part, its time limits, and what it says of bad outcomes."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trine.benchmarks import gpu_compare, gpu_pass
from trine.benchmarks.gpu_pass import Budget, Row, Stage
from trine.benchmarks.kernel_problem import all_cases

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m trine.benchmarks.gpu_pass` as on a machine where Trine is not installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), **variables}
    command = [sys.executable, "-m", "trine.benchmarks.gpu_pass", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def python(code: str, minutes: float = 1.0, name: str = "a stage", **options: object) -> Stage:
    return Stage(name, [sys.executable, "-c", code], minutes, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_cpu_agrees_with_itself(tmp_path: Path) -> None:
    folders = ("--results", str(tmp_path / "results"), "--logs", str(tmp_path / "logs"))
    done = run("--device", "cpu", "--steps", "12", "--minutes", "12", "--bench", *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    # Rows are printed as stages end, then all together.
    table = re.findall(r"^(ok|FAIL|----) +(.+?)  ", done.stdout.partition("\nlogs: ")[2], re.MULTILINE)
    assert [check for _, check in table] == [
        "trine doctor",
        "loss falls",
        "float32 losses",
        "bfloat16 losses",
        "two runs, same bits",
        "greedy tokens",
        *(
            str(file.relative_to(ROOT))
            for file in sorted((ROOT / "tests/gpu").glob("test_*.py"))
            if file != gpu_pass.HOPPER
        ),
        "bench generate 34M",
        "bench kernels of serving",
        "bench train 34M",
        "bench other kernels",
    ]
    assert {result for result, _ in table} == {"ok"}
    for name in ("kernels-cpu-*.json", "kernels-serving-cpu-*.json"):
        (result,) = (tmp_path / "results").glob(name)
        assert json.loads(result.read_text())["rows"]
    assert len(list((tmp_path / "logs").glob("*.log"))) == 7


def test_what_says_most_is_timed_first_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(sys, "argv", ["gpu_pass", "--bench"])
    _, alone = gpu_pass._stages("cuda:0", gpu_pass._parse())
    assert [stage.name.removeprefix("bench ") for stage in alone] == [
        "generate 1B", "kernels of serving", "train 1B", "generate 34M", "train 34M", "other kernels",
    ]  # fmt: skip
    operations = [name for stage in alone if stage.settings for name in stage.settings["operations"]]  # type: ignore[attr-defined]
    assert sorted(operations) == sorted({case.operation for case in all_cases()})
    sizes = {case.sizes.get("M", case.sizes.get("N")) for case in all_cases() if "quantized" in case.operation}
    assert {1, 16, 4096} <= sizes
    monkeypatch.setattr(sys, "argv", ["gpu_pass", "--bench", "--operations", "sample,mlp"])
    _, alone = gpu_pass._stages("cuda:0", gpu_pass._parse())
    assert [stage.settings["operations"] for stage in alone if stage.settings] == [["sample", "mlp"]]


def test_benchmarks_have_half_of_the_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: dict[str, float] = {}

    def run(stage: Stage, budget: Budget, logs: Path) -> list[Row]:
        ends[stage.name] = budget.end - time.monotonic()
        return [Row(stage.name, True, "")]

    monkeypatch.setattr(gpu_pass, "run", run)
    monkeypatch.setattr(gpu_pass, "_stages", lambda *_: ([python("", name="checks")], [python("", name="benches")]))
    monkeypatch.setattr(sys, "argv", ["gpu_pass", "--device", "cpu", "--minutes", "10", "--bench"])
    assert gpu_pass.main() == 0
    assert 295 < ends["checks"] <= 300
    assert 595 < ends["benches"] <= 600
    assert re.findall(r"^ok +(\w+)", capsys.readouterr().out, re.MULTILINE) == ["checks", "benches"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert re.fullmatch(r"gpu_pass: device 'cuda': .+; use device=cpu\n", done.stderr)


def test_a_bare_machine_is_enough() -> None:
    """Nothing that is run needs more than `NEEDED`; doctor, which needs typer, is left out without it."""
    code = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "typer click rich pydantic jinja2 matplotlib tomli_w transformers".split():
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Bare())
import trine.benchmarks.gpu_pass, trine.benchmarks.gpu_compare, trine.benchmarks.kernel_tuning
from trine.benchmarks import kernels, gpu_workload
gpu_workload.make_data()
sys.exit(kernels.run(kernels.Settings(operations=("rms_norm",), device="cpu", rounds=1, quick=True)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_pass, "NEEDED", ("torch", "no_such_package", "nor_this"))
    monkeypatch.setattr(sys, "argv", ["gpu_pass"])
    assert gpu_pass.main() == 1
    assert (
        capsys.readouterr().err
        == "gpu_pass: not installed here: no_such_package, nor_this; install them and run again\n"
    )


def test_a_difference_beyond_the_tolerance_fails_its_row() -> None:
    assert gpu_compare.losses_row("losses", [1.0, 2.0], [1.0, 2.0001], 1e-3)["good"]
    assert not gpu_compare.losses_row("losses", [1.0, 2.0], [1.0, 2.01], 1e-3)["good"]
    assert not gpu_compare.losses_row("losses", [1.0, float("nan")], [1.0, 2.0], 1e-3)["good"]


def test_a_stage_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    monkey = Budget(0)
    rows = gpu_pass.run(python(code, minutes=0.5 / 60), monkey, tmp_path)
    assert rows == [Row("a stage", None, "not run: out of time")], "less than the least is not begun"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_pass, "_LEAST_SECONDS", 0)
        (row,) = gpu_pass.run(python(code, minutes=1.5 / 60), monkey, tmp_path)
    assert row.good is False
    assert row.detail.startswith("stopped after ")
    time.sleep(4)
    assert not alive.exists()


def test_what_the_minutes_do_not_suffice_for_is_said(tmp_path: Path) -> None:
    assert gpu_pass.run(python("raise SystemExit(3)"), Budget(0.01), tmp_path) == [
        Row("a stage", None, "not run: out of time")
    ]
    assert Budget(1).seconds(python("", minutes=0.5)) == 30


def test_failures_show_their_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = gpu_pass.run(python("print('the reason'); raise SystemExit(3)"), Budget(0), tmp_path)
    assert not row.good
    assert row.detail.startswith("exit status 3, ")
    assert "the reason" in capsys.readouterr().out
    (row,) = gpu_pass.run(python("print('much output')"), Budget(0), tmp_path)
    assert row.good
    assert "much output" not in capsys.readouterr().out
    assert "much output" in (tmp_path / "a-stage.log").read_text()


def test_programs_that_keep_time_are_told_how_much_there_is(tmp_path: Path) -> None:
    code = "import sys, json; print(json.loads(sys.argv[1]))"
    gpu_pass.run(python(code, minutes=10, settings={"quick": True}, show=True), Budget(5), tmp_path)
    shown = (tmp_path / "a-stage.log").read_text()
    minutes = re.search(r"'quick': True, 'minutes': (4\.\d+)", shown)
    assert minutes is not None
    assert 4.4 < float(minutes[1]) <= 4.5


def test_pytest_output_becomes_rows() -> None:
    output = (
        "[gw0] [  1%] PASSED tests/gpu/test_mlp.py::test_one[(3, 4)-silu] \n"
        "tests/gpu/test_mlp.py::test_two[torch.bfloat16-silu] \n"
        "[gw1] [ 20%] FAILED tests/gpu/test_mlp.py::test_two[torch.bfloat16-silu] \n"
        "[gw1] [ 30%] SKIPPED tests/gpu/test_rope.py::test_three\n"
        "[gw0] [ 40%] PASSED tests/gpu/test_rope.py::test_four\n"
        "[gw0] [ 40%] ERROR tests/gpu/test_rope.py::test_four\n"
    )
    rows = [
        Row("tests/gpu/test_mlp.py", False, "1 failed, 1 passed"),
        Row("  test_two[torch.bfloat16-silu]", False, ""),
        Row("tests/gpu/test_rope.py", False, "1 error, 1 skipped"),
        Row("  test_four", False, ""),
    ]
    last = "=== 1 failed, 2 passed, 1 skipped, 1 error in 12.34s (0:00:12) ===\n"
    assert gpu_pass._tested("tests/gpu", output + last) == rows
    cut = [Row("tests/gpu", False, "not all tests ended"), *rows]
    assert gpu_pass._tested("tests/gpu", output + "=== test session starts ===\n") == cut
    assert gpu_pass._tested("x", "Segmentation fault\n") == []


def test_broken_and_hanging_test_processes_are_replaced() -> None:
    command = gpu_pass._pytest(argparse.Namespace(jobs=3, tests="mlp and not rope"))
    assert command[command.index("-n") + 1] == "3"
    assert command[command.index("-k") + 1] == "mlp and not rope"
    assert "--max-worker-restart" in command


def test_bench_output_becomes_rows() -> None:
    left_out = [
        {"operation": "attention", "shape": "T8192", "contestant": "cuDNN", "reason": "RuntimeError: No kernel"},
        {"operation": "mlp", "shape": "N1", "contestant": "trine", "reason": "FAILED: OutOfResources: shared"},
        {"operation": "rms_norm", "shape": "N2", "contestant": "", "reason": "not run: 5 minutes are over"},
    ]
    output = "table\n" + json.dumps({"rows": [{}, {}], "left_out": left_out}) + "\n"
    assert gpu_pass._benched("bench kernels", output) == [
        Row("bench kernels", True, "2 passes timed"),
        Row("  mlp N1", False, "FAILED: OutOfResources: shared"),
        Row("  rms_norm N2", None, "not run: 5 minutes are over"),
    ]
    assert gpu_pass._benched("bench kernels", "killed\n") == []


def test_races_against_transformers_become_a_row() -> None:
    speeds = {"trine": 1200.0, "transformers, one batch": 800.0}
    output = json.dumps({"contestants": {name: {"tokens_per_second": speed} for name, speed in speeds.items()}})
    detail = "1,200 tokens/s; 1.50 x transformers, one batch"
    assert gpu_pass._raced("bench generate 1B", output) == [Row("bench generate 1B", True, detail)]
    assert gpu_pass._raced("bench generate 1B", "stopped\n") == []
