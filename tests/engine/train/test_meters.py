"""The meters tell the truth: tokens counted are tokens trained, rates are tokens over the time they took.

The clock is ours and only work moves it: a step takes `STEP_SECONDS`, an evaluation or a save much longer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from trine.engine.train import evaluation, loop
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.meters import Meter
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import resolve
from trine.engine.train.saver import Saver
from trine.engine.train.validation import validate

MakeRecipe = Callable[..., Recipe]
STEP_SECONDS, PAUSE_SECONDS = 0.5, 100.0
ROLLBACK = {"checkpoint": {"every": 3}, "spike": {"action": "rollback", "window": 3}}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def targets(recipe: Recipe, samples: list[int]) -> int:
    """Targets of these samples that count, one by one: the first token of a document is nobody's target."""
    stream = resolve(recipe).stream
    return sum(int((stream.batch(sample, 1).targets_BT >= 0).sum()) for sample in samples)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time by our clock, in a list of one; moved on by steps, evaluations and saves of the trainer."""
    now = [1000.0]

    def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **settings: Any) -> Any:
            now[0] += seconds
            return function(*args, **settings)

        return wrapper

    monkeypatch.setattr(loop, "Meter", functools.partial(Meter, clock=lambda: now[0]))
    monkeypatch.setattr(steps, "accumulate_gradients", slow(steps.accumulate_gradients, STEP_SECONDS))
    monkeypatch.setattr(Saver, "save", slow(Saver.save, PAUSE_SECONDS))
    monkeypatch.setattr(evaluation, "validate", slow(validate, PAUSE_SECONDS))
    return now


@pytest.mark.parametrize(
    ("settings", "masked"),
    [
        ({}, True),
        ({"micro_batch_size": 1}, True),
        ({"micro_batch_size": 2, "batch_size": 6}, True),
        ({"micro_batch_size": 2}, False),
    ],
    ids=["whole", "accumulated by one", "accumulated by two", "unmasked"],
)
def test_tokens_counted_are_tokens_trained(
    make_recipe: MakeRecipe, tmp_path: Path, settings: dict[str, int], masked: bool
) -> None:
    recipe = make_recipe(train={"steps": 3, **settings}, data={"document_mask": masked})
    result = train(recipe)
    expected = [targets(recipe, list(range(step * recipe.train.batch_size))) for step in (1, 2, 3)]
    assert [line["tokens"] for line in records(tmp_path / "run", "step")] == expected
    assert result.tokens == records(tmp_path / "run", "end")[0]["tokens"] == expected[-1]
    assert (expected[-1] == 3 * recipe.train.batch_size * 32) == (not masked)


def test_tokens_of_steps_that_were_lost_are_not_counted_when_a_run_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(checkpoint={"every": 3})
    original = loop.Trainer._one_step

    def failing(self: loop.Trainer, *args: Any) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    result = train(recipe)
    assert [line["tokens"] for line in records(tmp_path / "run", "step")] == [
        targets(recipe, list(range(4 * step))) for step in range(1, 9)
    ]
    assert result.tokens == targets(recipe, list(range(32)))


def test_tokens_taken_back_by_a_rollback_are_not_counted(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = steps.accumulate_gradients

    def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
        loss = original(model, objective, pieces, **settings)
        return loss * 10 if pieces[0].first_sample == 16 else loss

    monkeypatch.setattr(steps, "accumulate_gradients", accumulate)
    recipe = make_recipe(**ROLLBACK)
    result = train(recipe)
    (rollback,) = records(tmp_path / "run", "rollback")
    assert rollback["skipped"] == [12, 20]
    assert result.tokens == targets(recipe, [*range(12), *range(20, 40)])
    assert records(tmp_path / "run", "step")[-1]["tokens"] == result.tokens


def test_the_rate_is_tokens_over_the_time_of_steps(
    make_recipe: MakeRecipe, tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither evaluations nor saves count as training, in the log and on the screen."""
    recipe = make_recipe(train={"micro_batch_size": 1}, eval={"every": 2}, checkpoint={"every": 2})
    result = train(recipe)
    start = records(tmp_path / "run", "start")[0]
    rate = 4 * 32 / STEP_SECONDS
    for line in records(tmp_path / "run", "step"):
        assert line["tokens_per_second"] == rate
        assert line["seconds"] == line["step"] * STEP_SECONDS
        assert line["mfu"] == rate * start["flops_per_token"] / start["peak_flops"]
    assert result.seconds == 8 * STEP_SECONDS
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ") and "tok/s" in line]
    assert len(lines) == 8
    assert all("| 256 tok/s |" in line for line in lines)


@pytest.mark.slow
def test_the_rate_after_a_rollback_is_still_tokens_over_time(
    make_recipe: MakeRecipe, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = steps.accumulate_gradients  # of the clock's fixture: it takes its time

    def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
        loss = original(model, objective, pieces, **settings)
        return loss * 10 if pieces[0].first_sample == 16 else loss

    monkeypatch.setattr(steps, "accumulate_gradients", accumulate)
    train(make_recipe(**ROLLBACK))
    lines = records(tmp_path / "run", "step")
    assert [line["tokens_per_second"] for line in lines] == [4 * 32 / STEP_SECONDS] * 8
    assert [line["seconds"] for line in lines] == [step * STEP_SECONDS for step in range(1, 9)]


def test_the_rate_of_a_run_that_goes_on_is_its_own(make_recipe: MakeRecipe, tmp_path: Path, clock: list[float]) -> None:
    """The time it was not running counts for nothing; its training time and tokens go on from where they were."""
    train(make_recipe(train={"steps": 3}))
    clock[0] += 1e6
    train(make_recipe(train={"steps": 6}, checkpoint={"every": 5}))
    lines = records(tmp_path / "run", "step")
    assert [line["seconds"] for line in lines] == [step * STEP_SECONDS for step in range(1, 7)]
    assert {line["tokens_per_second"] for line in lines} == {4 * 32 / STEP_SECONDS}
