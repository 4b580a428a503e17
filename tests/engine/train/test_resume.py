"""A run that was interrupted and continued equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trine.engine.env import environment
from trine.engine.errors import DataError, UsageError
from trine.engine.train import loop
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe, recipe_toml
from trine.engine.train.resume import machine_differences

MakeRecipe = Callable[..., Recipe]
CASES: dict[str, dict[str, Any]] = {
    "adamw-fp32-dropout-accumulated": {
        "model": {"dropout": 0.2}, "train": {"micro_batch_size": 2}, "schedule": {"kind": "linear"},
    },
    "adamw-bf16-unmasked": {"train": {"compute_dtype": "bfloat16"}, "data": {"document_mask": False}},
    "muon-fp32": {"optim": {"name": "muon"}, "schedule": {"kind": "wsd"}},
    "muon-bf16-dropout-accumulated-checkpointed": {
        "model": {"dropout": 0.1},
        "train": {"compute_dtype": "bfloat16", "micro_batch_size": 1, "checkpoint_activations": True},
        "optim": {"name": "muon"},
    },
    "adamw-8-bit": {"optim": {"state_dtype": "int8"}},
    "gpt2-adamw": {"model": {"family": "gpt2", "dropout": 0.1}},
}  # fmt: skip
TIMES = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "joules", "time"}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(run: Path) -> list[dict[str, Any]]:
    """Everything that was computed: steps, evaluations and samples without times."""
    kinds = ("step", "eval", "sample")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records(run) if r["kind"] in kinds]


def assert_same_run(one: Path, other: Path) -> None:
    assert comparable(one) == comparable(other)
    names = [(one / "latest").read_text().strip(), "final"]
    assert (other / "latest").read_text().strip() == names[0]
    files = [Path(names[0]) / "model.safetensors", Path(names[0]) / "state" / "optimizer.safetensors"]
    for file in [*files, Path("final") / "model.safetensors"]:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stop_at(step)`: the next run is asked to stop once it has done that step."""

    def arrange(step: int) -> None:
        monkeypatch.undo()
        original = loop.Trainer._one_step

        def one_step(self: loop.Trainer, *args: Any) -> None:
            original(self, *args)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(loop.Trainer, "_one_step", one_step)

    return arrange


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_identical(case: str, make_recipe: MakeRecipe, tmp_path: Path, stop_at: Any) -> None:
    settings = {**CASES[case], "eval": {"every": 3, "sample_prompts": ["Ada"], "sample_tokens": 4}}
    whole = make_recipe(**settings, run={"dir": str(tmp_path / "whole")})
    parts = make_recipe(**settings, run={"dir": str(tmp_path / "parts")})
    assert train(whole).reason == "finished"
    stop_at(3)
    assert train(parts).reason == "interrupted"
    stop_at(4)
    assert train(parts).reason == "interrupted"
    stop_at(-1)
    result = train(parts)
    assert (result.reason, result.step) == ("finished", 8)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_work_after_the_last_checkpoint_is_done_again_and_logged_once(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole = make_recipe(checkpoint={"every": 3}, run={"dir": str(tmp_path / "whole")})
    train(whole)
    lost = make_recipe(checkpoint={"every": 3}, run={"dir": str(tmp_path / "lost")})
    train(lost)
    run = tmp_path / "lost"
    # As a kill after step 7 leaves it: the newest checkpoint is that of step 6.
    shutil.rmtree(run / "step-00000008")
    shutil.rmtree(run / "final")
    (run / "latest").write_text("step-00000006\n")
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(metrics[:-2]) + '\n{"kind": "st')
    train(lost)
    assert [record["step"] for record in records(run) if record["kind"] == "step"] == list(range(1, 9))
    assert_same_run(tmp_path / "whole", run)


def test_sigterm_saves_exits_with_zero_and_says_how_to_continue(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 30}, run={"dir": str(tmp_path / "run")})
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_toml(recipe))
    program = "import sys; from trine.cli.main import main; main()"
    command = [sys.executable, "-c", program, "train", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("step  3/30"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, "".join(seen)
    told = next(line for line in seen if "continue with: trine train" in line)
    end = records(tmp_path / "run")[-1]
    assert (end["kind"], end["reason"]) == ("end", "interrupted")
    assert 3 <= end["step"] < 30
    arguments = shlex.split(told.split("continue with: trine ")[1])
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, cwd=tmp_path, capture_output=True)
    train(make_recipe(train={"steps": 30}, run={"dir": str(tmp_path / "whole")}))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


BREAKING: dict[str, dict[str, Any]] = {
    "model.width": {"model": {"width": 64}},
    "model.dropout": {"model": {"dropout": 0.5}},
    "data.seq_len": {"data": {"seq_len": 16}},
    "train.seed": {"train": {"seed": 5}},
    "optim.name": {"optim": {"name": "muon"}},
}


@pytest.fixture
def stopped(make_recipe: MakeRecipe, stop_at: Any) -> None:
    stop_at(2)
    train(make_recipe())
    stop_at(-1)


@pytest.mark.usefixtures("stopped")
def test_a_changed_recipe_is_refused_naming_the_key(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for key, change in BREAKING.items():
        with pytest.raises((UsageError, DataError), match=f"^{key} was ") as caught:
            train(make_recipe(**change))
        assert "run.dir=NEW_FOLDER" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.usefixtures("stopped")
def test_a_changed_learning_rate_is_accepted_and_said(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(make_recipe(optim={"lr": 1e-3})).reason == "finished"
    assert "optim.lr was 0.005, is 0.001" in capsys.readouterr().err
    resumed = next(record for record in records(tmp_path / "run") if record["kind"] == "resume")
    assert resumed["differences"] == ["optim.lr was 0.005, is 0.001"]


def test_only_what_the_bits_depend_on_is_compared_one_line_each() -> None:
    before = environment()
    other = {"trine": "9.9", "threads": 64, "platform": "Linux 1.0", "python": "3.99", "memory_bytes": 1}
    packages = {**before["packages"], "torch": "0.1", "tokenizers": "0.1", "triton": "0.2"}
    numerics = {**before["numerics"], "cpu_capability": "none", "deterministic_algorithms": "maybe", "MKL_CBWR": "SSE2"}
    rounding = "products and sums may be rounded otherwise"
    assert machine_differences(before, before) == []
    assert machine_differences(before, {**before, **other, "packages": packages, "numerics": numerics}) == [
        f"trine was {before['trine']}, is 9.9: what computes may have changed",
        f"threads was {before['threads']}, is 64: sums are split otherwise and rounded otherwise",
        f"torch was {before['packages']['torch']}, is 0.1: what computes may have changed",
        f"triton was {before['packages'].get('triton')}, is 0.2: what computes may have changed",
        f"MKL_CBWR was {before['numerics'].get('MKL_CBWR')}, is SSE2: {rounding}",
        f"cpu_capability was {before['numerics']['cpu_capability']}, is none: {rounding}",
        "deterministic_algorithms was False, is maybe: a GPU may give other bits in every run",
    ]


@pytest.mark.usefixtures("stopped")
def test_other_threads_are_accepted_and_what_will_differ_is_said(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert train(make_recipe(train={"threads": 2})).reason == "finished"
    finally:
        torch.set_num_threads(1)
    difference = "threads was 1, is 2: sums are split otherwise and rounded otherwise"
    said = capsys.readouterr().err
    assert f"warning: continuing is not identical to an uninterrupted run: {difference}\n" in said
    assert "the same as before: the order of the data" in said
    resumed = next(record for record in records(tmp_path / "run") if record["kind"] == "resume")
    assert resumed["differences"] == [difference]


def test_no_random_generator_of_the_process_has_a_say(make_recipe: MakeRecipe, tmp_path: Path, stop_at: Any) -> None:
    """Python's, numpy's and torch's: what a checkpoint does not hold, a run does not depend on."""
    whole = make_recipe(model={"dropout": 0.2}, optim={"state_dtype": "int8"}, run={"dir": str(tmp_path / "whole")})
    parts = whole.model_copy(update={"run": whole.run.model_copy(update={"dir": tmp_path / "parts"})})
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    train(whole)
    for seed, stop in ((2, 3), (3, -1)):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        stop_at(stop)
        train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("stopped")
def test_never_does_not_touch_a_run_and_a_step_folder_starts_a_branch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        train(make_recipe(), resume="never")
    step = tmp_path / "run" / "step-00000002"
    branch = train(make_recipe(run={"dir": str(tmp_path / "branch")}), resume=step)
    assert (branch.reason, branch.step) == ("finished", 8)
    train(make_recipe(), resume=step)
    assert_same_run_weights(tmp_path / "run", tmp_path / "branch")


def assert_same_run_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_of_something_else_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty .*thesis.txt.* give a new folder"):
        train(make_recipe())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_resume_folder_that_is_none_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--resume .*nowhere"):
        train(make_recipe(), resume=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()
