"""Mixtures with limits in a run: said before and when a source ends, exact after an interruption."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError, UsageError
from trine.engine.train import loop
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def mixed(data_dir: Path, tmp_path: Path, make_recipe: MakeRecipe) -> MakeRecipe:
    """A recipe of two sources, the second of which ends at 12 samples: in step 6 of 8 with 4 samples each."""
    (tmp_path / "second").symlink_to(data_dir)

    def make(**changes: Any) -> Recipe:
        sources = [{"path": str(data_dir)}, {"path": str(tmp_path / "second"), "max_tokens": 12 * 32 + 5}]
        recipe = make_recipe(**{"checkpoint": {"every": 2}, **changes})
        table = recipe.model_dump(mode="json", exclude_none=True)
        del table["data"]["path"]
        table["data"]["sources"] = sources
        return Recipe.model_validate(table)

    return make


def ends(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "source_end"]


def test_a_dry_run_tells_what_each_source_gives(
    mixed: MakeRecipe, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(mixed(train={"steps": 16}), dry_run=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("source ")]
    windows = TokenShards.open(data_dir).num_tokens // 32
    assert len(lines) == 2
    assert f"{data_dir}: 50.0% at first, 81.2% of the run = 1.66k tokens = {52 / windows:.2f} epochs of" in lines[0]
    assert f"18.8% of the run = 384 tokens = {12 / windows:.2f} epochs" in lines[1]
    assert lines[1].endswith("; ends in step 6 (max_tokens = 389), then the others share its part")
    train(mixed(train={"steps": 3}), dry_run=True)
    assert "; its limit (max_tokens = 389) is not reached" in capsys.readouterr().out


def test_the_end_of_a_source_is_said_and_logged_and_a_resumed_run_has_the_same_bits(
    mixed: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = (mixed(train={"steps": 9}, run={"dir": str(tmp_path / name)}) for name in ("whole", "parts"))
    train(whole)
    said = capsys.readouterr().err
    assert f"step 6: {tmp_path / 'second'} has given all it may (max_tokens = 389); the others share its part" in said
    (end,) = ends(tmp_path / "whole")
    assert (end["step"], end["path"], end["samples"]) == (6, str(tmp_path / "second"), 12)
    for stop in (5, 7, None):  # before the end of the source, after it, never
        original = loop.Trainer._one_step

        def one_step(self: loop.Trainer, *arguments: Any, original: Any = original, stop: int | None = stop) -> None:
            original(self, *arguments)
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(loop.Trainer, "_one_step", one_step)
        assert train(parts).reason == ("interrupted" if stop else "finished")
        monkeypatch.undo()
    assert ends(tmp_path / "parts") == [end]
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_more_steps_than_the_limits_allow_are_refused(mixed: MakeRecipe, data_dir: Path) -> None:
    table = mixed(train={"steps": 9}).model_dump(mode="json", exclude_none=True)
    table["data"]["sources"][0]["max_tokens"] = 10 * 32
    message = r"steps = 9 of train\.batch_size = 4 take 36 samples, .* allow 22 in all, enough for 5 steps"
    with pytest.raises(UsageError, match=message):
        train(Recipe.model_validate(table), dry_run=True)


def test_a_changed_limit_is_another_sequence_and_not_continued(mixed: MakeRecipe, tmp_path: Path) -> None:
    recipe = mixed(train={"steps": 4})
    train(recipe)
    table = recipe.model_dump(mode="json", exclude_none=True)
    table["data"]["sources"][1]["max_tokens"] = 20 * 32
    table["train"]["steps"] = 6
    with pytest.raises(DataError, match="mixing weights"):
        train(Recipe.model_validate(table))


def test_a_run_that_passed_samples_by_ends_well_where_its_sources_end(
    make_recipe: MakeRecipe, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    table = make_recipe(
        train={"steps": 8}, checkpoint={"every": 3, "keep_last": 9}, spike={"action": "rollback", "window": 3}
    ).model_dump(mode="json", exclude_none=True)
    del table["data"]["path"]
    table["data"]["sources"] = [{"path": str(data_dir), "max_tokens": 8 * 4 * 32}]
    original = steps.accumulate_gradients

    def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Any:
        loss = original(model, objective, pieces, **settings)
        return loss * math.nan if pieces[0].first_sample == 16 else loss  # the fifth step

    monkeypatch.setattr(steps, "accumulate_gradients", accumulate)
    result = train(Recipe.model_validate(table))
    assert (result.reason, result.step) == ("stopped-early", 6)  # steps 4 and 5 went back to 3, past their samples
    assert "the limits of the sources leave no further step, since samples were passed by" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert train(Recipe.model_validate(table)).step == 6  # and is left as it is
