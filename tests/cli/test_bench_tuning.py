"""`trine bench kernels --tune`, on a made-up kernel whose time passes as told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.benchmarks import kernel_tuning
from trine.benchmarks.kernel_problem import Case, Cost, Inputs, Problem, all_cases
from trine.benchmarks.timing import Stopwatch
from trine.kernels import tuning
from trine.kernels.target import Target
from trine.kernels.tuning import Config, Tunable

CPU = torch.device("cpu")
GPU = Target("sm_90", num_sms=132, shared_bytes=227 * 1024, gpu="NVIDIA H900")
MADE_UP = Tunable(
    "made_up",
    lambda shape, dtype, target: Config({"ROWS": 1}),
    lambda shape, dtype, target: [Config({"ROWS": rows}) for rows in (1, 2, 3, 4, 5)],
)
# 2 is fast, 3 faster and wrong, 4 does not launch, 5 hangs where it is compiled.
SECONDS = {1: 6.0, 2: 2.0, 3: 1.0, 5: 1.0}


class Clock(Stopwatch):
    """Time passes where a kernel is launched, and nowhere else."""

    now = 0.0

    def turn(self, call: Callable[[], object]) -> float:
        begin = self.now
        call()
        return self.now - begin

    def launch(self, x: Tensor) -> Tensor:
        rows = MADE_UP.pick(x.dtype, GPU, N=len(x)).blocks["ROWS"]
        if rows == 4:
            raise RuntimeError("out of resource: shared memory")
        self.now += SECONDS[rows]
        return x * (3.0 if rows == 3 else 2.0)


def test_tuning_keeps_the_fastest_configuration_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(kernel_tuning, "new_pool", lambda: None)
    tuning.forget()

    clock = Clock(CPU)

    def build(inputs: Inputs, N: int) -> Problem:
        x = inputs.normal(N, 64)
        return Problem(
            ours=lambda: clock.launch(x),
            plain=lambda: x * 2,
            forward=Cost(),
            backward=Cost(),
            leaves=(x,),
            cut=(x,),
            exact=lambda x: x * 2,
        )

    case = Case("made_up", {"N": 64}, build, True, False)
    monkeypatch.setattr(kernel_tuning, "all_cases", lambda: [case])
    tuner = kernel_tuning.Tuner(CPU, torch.float32)
    tuner.watch = clock
    hangs = Config({"ROWS": 5})
    monkeypatch.setattr(tuner, "_compile", lambda some: ["no answer" if c.config == hangs else "" for c in some])
    tuner.tune(case)
    tuner.tune(case)  # is answered already
    (entry,) = json.loads((tmp_path / "nvidia-h900.json").read_text())["entries"]
    assert entry["config"] == {"num_warps": 4, "num_stages": 2, "ROWS": 2}
    assert entry["shape"] == {"N": 64}
    assert (entry["microseconds"], entry["rule_microseconds"]) == (2e6, 6e6)
    assert entry["versions"]["torch"] == torch.__version__
    assert (tuner.tried, tuner.failed, tuner.improved) == (5, 3, 1)
    said = capsys.readouterr().err
    for rows, reason in ((3, "other numbers than the rule's"), (4, "out of resource"), (5, "no answer")):
        assert any(f"'ROWS': {rows}" in line and reason in line for line in said.splitlines())
    assert MADE_UP.pick(torch.float32, GPU, N=64).blocks["ROWS"] == 2, "used at once"
    tuning.forget()


@pytest.mark.slow
def test_a_configuration_that_hangs_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_tuning, "PATIENCE_SECONDS", 15)
    monkeypatch.setattr(kernel_tuning, "_run_once", time.sleep)
    tuner = kernel_tuning.Tuner(CPU, torch.float32)
    seconds: Any = [0, 600, 0.1]
    assert tuner._compile(seconds) == [None, "no answer after 15 s: it hangs, or its process died", None]
    tuner.pool.terminate()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_candidates_run_in_other_processes() -> None:
    place = next(place for place, case in enumerate(all_cases()) if not case.on_gpu)
    found = kernel_tuning.Candidate(place, "cpu", torch.float32, True, "made_up", (("N", 64),), Config({"ROWS": 1}))
    tuner = kernel_tuning.Tuner(CPU, torch.float32)
    reasons = tuner._compile([found, replace(found, case=10**6)])
    tuner.pool.terminate()
    # The first ran, and then waited for a GPU that is not there.
    assert [reason.partition(":")[0] for reason in reasons] == ["AssertionError", "IndexError"]


def test_candidates_may_round_results_but_not_codes_and_tokens() -> None:
    """Of float8 a rounding is large, and torch cannot even take the largest of them."""
    close, codes, tokens = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 112.0]), torch.tensor([3, 128255])
    kernel_tuning._compare((close + 1e-7,), [close])
    kernel_tuning._compare((codes.to(torch.float8_e4m3fn),), [codes.to(torch.float8_e4m3fn)])
    kernel_tuning._compare((tokens.clone(),), [tokens])
    for found, expected in (
        (close + 1e-4, close),
        (tokens + 1, tokens),
        (codes.to(torch.int8) - 1, codes.to(torch.int8)),
    ):
        with pytest.raises(ValueError, match="other numbers than the rule's"):
            kernel_tuning._compare((found,), [expected])
