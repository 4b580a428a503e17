"""Loss spikes and gradients that are not finite: seen before the update, and left behind with their data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trine.engine.errors import LossSpikeError, NonFiniteError, UsageError
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe, SpikeSettings
from trine.engine.train.spikes import LossWatch
from trine.engine.train.step_folder import read_state

MakeRecipe = Callable[..., Recipe]
BAD_SAMPLE = 16  # of a batch size of 4: the fifth step
ROLLBACK = {"checkpoint": {"every": 3, "keep_last": 9}, "spike": {"action": "rollback", "window": 3}}


@pytest.fixture
def bad_data(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`bad_data(factor, *samples)`: the loss of steps that begin with one of these is `factor` times what it is.

    With NaN it is the gradient of one parameter.
    """
    original = steps.accumulate_gradients

    def arrange(factor: float, *samples: int) -> None:
        def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
            loss = original(model, objective, pieces, **settings)
            if pieces[0].first_sample in samples:
                if factor != factor:
                    model.get_parameter("layers.1.mlp.up_proj.weight").grad.fill_(factor)
                else:
                    loss = loss * factor
            return loss

        monkeypatch.setattr(steps, "accumulate_gradients", accumulate)

    return arrange


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_spike_is_a_loss_far_above_those_of_a_full_window() -> None:
    watch = LossWatch(SpikeSettings(action="stop", window=4, threshold=3.0))
    for step, loss in enumerate((50.0, 4.0, 6.0, 4.0), start=1):
        watch.check(loss, step=step)  # the window is not full
    watch.check(6.0, step=5)  # 4, 6, 4, 6: mean 5, deviation 1
    watch.check(8.0, step=6)
    watch = LossWatch(SpikeSettings(action="stop", window=4, threshold=3.0), [4.0, 6.0, 4.0, 6.0])
    with pytest.raises(
        LossSpikeError, match=r"loss of step 7 is 8\.1, the mean of the 4 before it 5 .* deviation of 1:"
    ):
        watch.check(8.1, step=7)
    assert list(watch.recent) == [4.0, 6.0, 4.0, 6.0]
    watch.check(8.0, step=7)
    off = LossWatch(SpikeSettings(window=2), [1.0, 1.0])
    off.check(1e9, step=3)
    assert list(off.recent) == []


def test_rollback_is_a_run_that_never_saw_the_data(
    make_recipe: MakeRecipe, tmp_path: Path, bad_data: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to the checkpoint of step 3, past samples 12 to 19: the same bits as when these are never dealt."""
    bad_data(10.0, BAD_SAMPLE)
    result = train(make_recipe(**ROLLBACK))
    assert (result.reason, result.step) == ("finished", 8)
    run = tmp_path / "run"
    (rollback,) = records(run, "rollback")
    assert (rollback["step"], rollback["from_step"], rollback["skipped"]) == (3, 5, [12, 20])
    assert "a spike by spike.threshold = 6" in rollback["reason"]
    assert [line["step"] for line in records(run, "step")] == list(range(1, 9))
    state = read_state(run / "step-00000008")
    assert (state.skipped, state.next_sample) == ([[12, 20]], 20 + 5 * 4)
    assert read_state(run / "step-00000003").skipped == []

    original = steps.micro_batches

    def without(stream: Any, *, first_sample: int, **settings: Any) -> Any:
        return original(stream, first_sample=first_sample + 8 * (first_sample >= 12), **settings)

    monkeypatch.setattr(steps, "micro_batches", without)
    never = train(make_recipe(run={"dir": str(tmp_path / "never")}))
    assert never.tokens == result.tokens
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, tmp_path / "never"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["loss"] for line in records(run, "step")] == [
        line["loss"] for line in records(tmp_path / "never", "step")
    ]


def test_a_gradient_that_is_not_finite_is_left_behind_by_name(
    make_recipe: MakeRecipe, tmp_path: Path, bad_data: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    bad_data(float("nan"), BAD_SAMPLE)
    assert train(make_recipe(**ROLLBACK)).reason == "finished"
    (rollback,) = records(tmp_path / "run", "rollback")
    assert rollback["reason"].startswith("the gradient of layers.1.mlp.up_proj.weight is not finite at step 5")
    assert "going back to step-00000003, past samples 12 to 19" in capsys.readouterr().err


def test_a_run_that_goes_on_after_a_rollback_equals_one_that_was_not_stopped(
    make_recipe: MakeRecipe, tmp_path: Path, bad_data: Callable[..., None]
) -> None:
    bad_data(10.0, BAD_SAMPLE)
    train(make_recipe(**ROLLBACK))
    again = {**ROLLBACK, "run": {"dir": str(tmp_path / "again")}}
    train(make_recipe(**again), resume=tmp_path / "run" / "step-00000006")
    assert read_state(tmp_path / "again" / "step-00000008").skipped == [[12, 20]]
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_spikes_that_come_again_and_again_stop_the_run(
    make_recipe: MakeRecipe, tmp_path: Path, bad_data: Callable[..., None]
) -> None:
    bad_data(float("nan"), *range(BAD_SAMPLE, 100, 4))
    settings = {**ROLLBACK, "spike": {"action": "rollback", "max_rollbacks": 2}}
    with pytest.raises(NonFiniteError, match=r"went back to step-00000003 2 times already .*max_rollbacks.*last check"):
        train(make_recipe(**settings))
    assert records(tmp_path / "run", "end")[-1]["reason"] == "non-finite"


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    make_recipe: MakeRecipe, bad_data: Callable[..., None]
) -> None:
    bad_data(float("nan"), 4)
    with pytest.raises(NonFiniteError, match=r"step 2 .*; there is no checkpoint to go back to; no checkpoint was"):
        train(make_recipe(**ROLLBACK))
    with pytest.raises(
        UsageError, match=r'spike\.action = "rollback" has nothing to go back to with checkpoint\.every'
    ):
        make_recipe(spike={"action": "rollback"})


def test_stop_stops_at_a_spike_before_the_update(
    make_recipe: MakeRecipe, tmp_path: Path, bad_data: Callable[..., None]
) -> None:
    bad_data(10.0, BAD_SAMPLE)
    settings = {"checkpoint": {"every": 3}, "spike": {"action": "stop", "window": 3}}
    with pytest.raises(
        LossSpikeError, match=r"the loss of step 5 .*the last checkpoint is .*step-00000003; .*rollback"
    ):
        train(make_recipe(**settings))
    end = records(tmp_path / "run", "end")[-1]
    assert (end["step"], end["reason"]) == (4, "spike")
    assert train(make_recipe(**ROLLBACK)).reason == "finished"
    assert records(tmp_path / "run", "rollback")[0]["skipped"] == [12, 20]
