"""A run ends early once the validation loss has stopped falling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.errors import UsageError
from trine.engine.train import evaluation
from trine.engine.train.early_stopping import EarlyStopping
from trine.engine.train.loop import train
from trine.engine.train.recipe import EvalSettings, Recipe
from trine.engine.train.validation import ValidationResult

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("settings", "losses", "stops_after"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.0, 2.5], 4),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 1.9], None),
        ({"patience": 1, "min_improvement": 0.5}, [3.0, 2.4, 2.0], 3),
        ({"patience": 2}, [3.0, float("nan"), float("nan")], 3),
        ({}, [3.0] * 9, None),
    ],
)  # fmt: skip
def test_patience_counts_evaluations_without_improvement(
    settings: dict[str, Any], losses: list[float], stops_after: int | None
) -> None:
    stopping, evaluation = EarlyStopping(), EvalSettings(**settings)
    ended = []
    for number, loss in enumerate(losses, start=1):
        stopping.take(loss, step=number, settings=evaluation)
        ended.append(stopping.due(evaluation))
    assert (ended.index(True) + 1 if True in ended else None) == stops_after


def test_a_run_stops_early_and_goes_on_with_more_patience(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5])
    monkeypatch.setattr(evaluation, "validate", lambda *_, **__: ValidationResult(next(losses), None, 1))
    settings = {"train": {"steps": 12}, "checkpoint": {"every": 2, "keep_last": 1, "keep_best": 1}}
    result = train(make_recipe(**settings, eval={"every": 2, "patience": 2}))
    run = tmp_path / "run"
    assert (result.reason, result.step) == ("stopped-early", 8)
    assert "not fallen for 2 evaluations since step 4 (2.0000)" in capsys.readouterr().err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["reason"] == "stopped-early"
    assert (run / "final" / "model.safetensors").is_file()
    assert sorted(folder.name for folder in run.glob("step-*")) == ["step-00000004", "step-00000008"]
    assert train(make_recipe(**settings, eval={"every": 2, "patience": 2})).step == 8
    assert train(make_recipe(**settings, eval={"every": 2, "patience": 3})).step == 10


def test_patience_without_evaluations_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UsageError, match=r"eval\.patience has no effect with eval\.every = 0"):
        make_recipe(eval={"every": 0, "patience": 2})
    with pytest.raises(UsageError, match=r"eval\.min_improvement has no effect with eval\.patience = 0"):
        make_recipe(eval={"every": 2, "min_improvement": 0.1})
