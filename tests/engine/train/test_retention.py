"""Which checkpoints are kept."""

from __future__ import annotations

import random
from typing import Any

import pytest

from trine.engine.train.recipe import CheckpointSettings
from trine.engine.train.retention import SavedStep, steps_to_remove


def saved(*steps: int, damaged: tuple[int, ...] = (), losses: dict[int, float] | None = None) -> list[SavedStep]:
    losses = losses or {}
    return [SavedStep(step=step, complete=step not in damaged, validation_loss=losses.get(step)) for step in steps]


@pytest.mark.parametrize(
    ("settings", "steps", "removed"),
    [
        ({"keep_last": 2}, saved(10, 20, 30, 40), [10, 20]),
        ({"keep_last": 9}, saved(10, 20, 30, 40), []),
        ({"keep_last": 1, "keep_every": 20}, saved(10, 20, 30, 40), [10, 30]),
        ({"keep_last": 1, "keep_best": 1}, saved(10, 20, 30, 40, losses={10: 2.0, 20: 1.0, 30: 3.0}), [10, 30]),
        ({"keep_last": 1, "keep_best": 2}, saved(10, 20, 30, 40, losses={10: 1.0, 20: 1.0, 30: 1.0}), [10]),
        # Damaged ones count for nothing and go with the old ones.
        ({"keep_last": 2}, saved(10, 20, 30, 40, damaged=(20, 30)), [20, 30]),
        # What is newer than the step just saved stays, and nothing goes where that one is not whole.
        ({"keep_last": 1}, saved(10, 30, 40, 50, damaged=(50,)), [10, 30]),
        ({"keep_last": 1}, saved(10, 20, 30, 40, damaged=(40,)), []),
    ],
)  # fmt: skip
def test_what_is_removed_once_step_40_is_saved(
    settings: dict[str, Any], steps: list[SavedStep], removed: list[int]
) -> None:
    assert steps_to_remove(steps, CheckpointSettings(**settings), newest=40) == removed


def test_the_newest_complete_checkpoint_is_never_removed() -> None:
    choose = random.Random(0)
    for _ in range(2000):
        steps = saved(
            *choose.sample(range(1, 30), 8),
            damaged=tuple(choose.sample(range(1, 30), 10)),
            losses={step: choose.random() for step in range(1, 30) if choose.random() < 0.5},
        )
        settings = CheckpointSettings(
            keep_last=choose.randint(1, 3), keep_every=choose.choice((0, 2, 5)), keep_best=choose.randint(0, 2)
        )
        newest = choose.choice(steps).step
        removed = steps_to_remove(steps, settings, newest=newest)
        complete = [entry.step for entry in steps if entry.complete and entry.step <= newest]
        if complete:
            assert max(complete) not in removed
        assert all(step < newest for step in removed)
