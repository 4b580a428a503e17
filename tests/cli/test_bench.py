"""`trine bench kernels` on a CPU, and the parts of it that decide on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.benchmarks import kernels
from trine.benchmarks.kernel_check import Expected, as_tuple
from trine.benchmarks.kernel_problem import Case, Cost, Inputs, Problem, Sizes, all_cases, cases
from trine.benchmarks.kernels import Bench, Settings
from trine.benchmarks.timing import Ceilings, Stopwatch

CPU = torch.device("cpu")
SETTINGS = Settings(rounds=2, quick=True)
CPU_CASES = [case for case in all_cases() if not case.on_gpu]


class FastCeilings(Ceilings):
    """Of a small copy and product, for tests that do not ask how fast the machine is."""

    def __init__(self) -> None:
        super().__init__(CPU, torch.float32)
        self._source, self._target = self._source[:4096], self._target[:4096]
        self._factors = tuple(x[:32, :32] for x in self._factors)


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return FastCeilings()


def test_table_and_json_line(succeeds: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "folder/result.json"
    options = ("--quick", "--rounds", 1, "--operation", "rms_norm", "--operation", "adamw", "--dtype", "float32")
    printed = succeeds("bench", "kernels", *options, "--device", "cpu", "--out", out)
    *table, last = printed.splitlines()[: 1 + 4 + 1]
    assert [line.split()[0] for line in table] == ["operation", "adamw", "rms_norm", "rms_norm", "rms_norm"]
    result = json.loads(last)
    assert result == json.loads(out.read_text())
    assert [row["pass"] for row in result["rows"]] == ["forward", "forward", "backward", "both"]
    for row in result["rows"]:
        assert row["dtype"] == "float32"
        assert row["peer"] == "formula"
        assert row["microseconds"].keys() == {"trine", "formula", "copy", "product"}
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        assert row["percent_of_ceiling"] > 0
    assert result["environment"]["packages"]["torch"] == torch.__version__
    assert result["left_out"] == []
    assert "no GPU: torch paths on CPU" in printed


def test_wrong_usage_is_said_in_a_line(trine: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = trine("bench", "kernels", "--operation", "atention")
    assert status == 2
    assert "unknown operation 'atention'; one of attention, gated_mlp" in err
    status, _, err = trine("bench", "kernels", "--tune", "--device", "cpu")
    assert status == 2
    assert err == (
        "trine: --tune measures kernels on a GPU and there is none here; run it on the GPU it is meant for\n"
    )


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: f"{case.operation}-{case.shape}")
def test_every_case_computes_what_its_formula_says(case: Case) -> None:
    problem = case.problem(CPU, torch.float32)
    expected = Expected(problem)
    for forward in (problem.ours, problem.plain):
        results = as_tuple(forward())
        backward = expected.backward(results)
        error, gradient_error = expected.errors(results, backward)
        assert error < 2e-4
        assert (gradient_error is None) == (problem.backward is None)
        if gradient_error is not None:
            assert gradient_error < 2e-4
    assert problem.forward.flops or problem.forward.bytes


class AsOnGpu(Inputs):
    """Inputs on the CPU for a case that believes to be on a GPU, so that it has peers."""

    @property
    def on_gpu(self) -> bool:
        return True


# What torch has for GPUs only.
GPU_PEERS = {
    "cuDNN",
    "cuDNN, repeated",
    "cuDNN, no pages",
    "flash, by sequences",
    "torch int4",
    "_scaled_mm, blocks",
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: f"{case.operation}-{case.shape}")
def test_every_peer_computes_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    problem = case.build(AsOnGpu(CPU, torch.float32), **case.sizes)
    assert problem.peers
    expected = Expected(problem)
    for name, forward in problem.peers.items():
        if name in GPU_PEERS:
            continue
        trains = not name.startswith("flex_attention")  # it has no backward on a CPU
        for leaf in problem.leaves:
            leaf.requires_grad_(trains)
        results = as_tuple(forward())
        if not trains:
            assert expected.errors(results, None)[0] < 2e-4
            continue
        error, gradient_error = expected.errors(results, expected.backward(results))
        # cuBLAS multiplies what codes round.
        rounds = name == "cuBLAS" and str(case.sizes.get("kind")).startswith(("int8", "fp8"))
        assert error < (0.2 if rounds else 2e-4), name
        assert (gradient_error or 0.0) < 2e-4, name


def test_gpu_cases_name_their_operations_like_the_cpu_ones() -> None:
    on_gpu = dict.fromkeys(case.operation for case in all_cases() if case.on_gpu)
    on_cpu = dict.fromkeys(case.operation for case in CPU_CASES)
    assert list(on_gpu) == list(on_cpu)
    shapes = [(case.operation, case.shape, case.on_gpu) for case in all_cases()]
    assert len(set(shapes)) == len(shapes), "two cases have one name"
    assert sum(case.quick and case.on_gpu for case in all_cases()) == len(on_gpu)
    sizes: Sizes = {"N": 8, "M": 0.25, "kind": "causal", "window": 4}
    assert Case("x", sizes, lambda: None, False, False).shape == "N8 M0.25 causal window4"  # type: ignore[arg-type, return-value]


def problem_of(inputs: Inputs, N: int) -> Problem:
    """Twice a matrix."""
    x = inputs.normal(N, 64)
    return Problem(
        ours=lambda: x * 2,
        plain=lambda: x + x,
        forward=Cost(bytes=2.0 * x.nbytes),
        backward=Cost(bytes=2.0 * x.nbytes),
        leaves=(x,),
        cut=(x[:8],),
        exact=lambda x: x * 2,
        part=lambda x: x[:8],
    )


def bench_of(changes: Callable[[Tensor], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[int, Bench]:
    """Run one made-up case."""

    def build(inputs: Inputs, N: int) -> Problem:
        problem = problem_of(inputs, N)
        return replace(problem, **changes(problem.leaves[0]))

    monkeypatch.setattr(kernels, "Ceilings", lambda device, dtype: FastCeilings())
    bench = Bench(SETTINGS, CPU, torch.float32)
    return bench.run([Case("made_up", {"N": 64}, build, True, False)]), bench


def test_a_peer_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported() -> Tensor:
        raise RuntimeError("No available kernel.\nmore lines")

    status, bench = bench_of(lambda x: {"peers": {"good": lambda: x * 2, "bad": unsupported}}, monkeypatch)
    assert status == 0
    assert [(row["contestant"], row["reason"]) for row in bench.left_out] == [
        ("bad", "RuntimeError: No available kernel.")
    ]
    assert {row["peer"] for row in bench.rows} == {"good"}


def test_a_kernel_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Tensor:
        raise KeyError("exact_D")

    status, bench = bench_of(lambda x: {"ours": broken}, monkeypatch)
    assert status == 1
    assert bench.rows == []
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left_out"][0]["reason"].startswith("FAILED: ")


def test_errors_show_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    status, bench = bench_of(lambda x: {"ours": lambda: x * 2.2}, monkeypatch)
    assert status == 0
    for row in bench.rows[:2]:
        assert row["errors"]["trine"] > 0.1
        assert row["errors"]["formula"] < 1e-6


@pytest.mark.parametrize("factor", [-2.0, float("nan")])
def test_plainly_wrong_numbers_are_a_failure(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    status, bench = bench_of(lambda x: {"ours": lambda: x * factor}, monkeypatch)
    assert status == 1
    assert bench.left_out[0]["reason"].startswith("FAILED: ValueError: wrong results: the largest error is")
    assert bench.rows == []


def test_a_variant_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, bench = bench_of(lambda x: {"variants": {"other": lambda: x + x}}, monkeypatch)
    assert [row["contestant"] for row in bench.rows] == ["trine", "other"] * 3
    assert {row["peer"] for row in bench.rows} == {"formula"}
    assert capsys.readouterr().out.count("made_up, other") == 3


@pytest.mark.parametrize(
    ("cost", "bound", "percent"),
    # At 1000 bytes and 4000 operations a second: 3 s of copying, 2 s of computing.
    [(Cost(8000, 3000), "memory", 75), (Cost(8000, 0), "compute", 50), (Cost(0, 3000), "memory", 75)],
)
def test_the_ceiling_is_the_longer_of_moving_and_computing(cost: Cost, bound: str, percent: float) -> None:
    class Known:
        bytes, flops = 2000, 8000

    seconds = {
        "trine": [4.0, 4.0, 5.0],
        "peer": [2.0, 6.0, 5.0],
        "slow": [9.0] * 3,
        "copy": [2.0] * 3,
        "product": [2.0] * 3,
    }
    case = Case("made_up", {"N": 1}, problem_of, True, False)
    row = kernels._row(case, "forward", torch.float32, cost, seconds, Known(), {}, "trine", ["trine"])  # type: ignore[arg-type]
    assert row["bound"] == bound
    assert row["percent_of_ceiling"] == pytest.approx(percent)
    assert row["peer"] == "peer"
    assert row["ratio"] == 1.0, "the median of 0.5, 1.5 and 1, not the ratio of medians"
    assert row["ratio_range"] == [0.5, 1.5]
    assert row["spread"]["trine"] == pytest.approx(0.25)


def test_no_case_is_begun_after_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "Ceilings", lambda device, dtype: FastCeilings())
    bench = Bench(replace(SETTINGS, minutes=1e-9), CPU, torch.float32)
    assert bench.run(CPU_CASES[:2]) == 0
    assert [row["reason"] for row in bench.left_out] == ["not run: 1e-09 minutes are over"] * 2


def test_contestants_take_turns_in_alternating_order() -> None:
    called: list[str] = []
    watch = Stopwatch(CPU, turn_seconds=0)
    seconds = watch.race({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert [name for place, name in enumerate(called) if place % 3 == 0] == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 3, "b": 3}


def test_on_a_gpu_what_is_timed_is_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is queued, on a device that is none: cache overwritten, stream held, event, call, event."""
    queued: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.place = -1

        def record(self) -> None:
            self.place = len(queued)
            queued.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 2.0 * (other.place - self.place)  # milliseconds

    class Flush:
        def zero_(self) -> None:
            queued.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: queued.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queued.append("hold" if cycles > 30_000 else "short"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    watch = Stopwatch(CPU, turn_seconds=0)
    watch.device = torch.device("cuda")
    watch._flush = Flush()  # type: ignore[assignment]
    assert watch.turn(lambda: queued.append("call")) == 4e-3
    assert queued == ["wait", "call", "wait", *["flush", "hold", "event", "call", "event"] * 3, "wait"]
    queued.clear()
    watch.warm_up(lambda: queued.append("call"))
    assert queued == ["call", "call", "call", "wait"]


def test_cases_are_registered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from trine.benchmarks import kernel_problem

    monkeypatch.setattr(kernel_problem, "CASES", [])
    cases("made_up", gpu=[{"N": 1}, {"N": 2}], cpu=[{"N": 3}])(problem_of)
    assert [(c.shape, c.quick, c.on_gpu) for c in kernel_problem.CASES] == [
        ("N1", True, True),
        ("N2", False, True),
        ("N3", True, False),
    ]
