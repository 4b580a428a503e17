"""The average of the weights: its numbers, its checkpoints, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trine.engine.convert.export import export
from trine.engine.errors import CheckpointError, UsageError
from trine.engine.train import step as steps
from trine.engine.train.ema import Ema
from trine.engine.train.loop import train
from trine.engine.train.recipe import EmaSettings, Recipe
from trine.engine.train.recipe_model import AdapterSettings
from trine.engine.train.step_folder import read_state

MakeRecipe = Callable[..., Recipe]
AVERAGED: dict[str, Any] = {
    "ema": {"decay": 0.8, "warmup_steps": 2},
    "checkpoint": {"every": 1, "keep_last": 20},
    "export": {"dtype": "float32", "weights": "ema"},
}


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] == "eval"]


def averages(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / f"step-{step:08d}" / "state" / "ema.safetensors")


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_averages_equal_the_formula_over_the_checkpoints(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """In float64, from the weights that each step left behind."""
    train(make_recipe(**AVERAGED, train={"steps": 7}))
    run = tmp_path / "run"
    weights = [load_file(run / f"step-{step:08d}" / "model.safetensors") for step in range(1, 8)]
    for name, found in averages(run, 7).items():
        key = name if name == "lm_head.weight" else f"model.{name}"
        series = [entry[key].numpy().astype(np.float64) for entry in weights]
        expected = series[1]  # the average begins where the warm-up ends
        for number, after in enumerate(series[2:], start=1):
            decay = min(0.8, (1 + number) / (10 + number))
            expected = decay * expected + (1 - decay) * after
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert_equal(averages(run, 2), {name: weights[1][name if name == "lm_head.weight" else f"model.{name}"]
                                    for name in averages(run, 2)})  # fmt: skip
    assert read_state(run / "step-00000007").ema_updates == 5
    final = load_file(run / "final" / "model.safetensors")
    assert_equal(
        final, {name if name == "lm_head.weight" else f"model.{name}": t for name, t in averages(run, 7).items()}
    )


def test_a_long_run_reaches_the_decay_of_the_recipe() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, EmaSettings(decay=0.5))
    expected = float(module.weight.detach())
    for step in range(1, 40):
        with torch.no_grad():
            module.weight.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.state_tensors()["weight"]) == pytest.approx(expected, rel=1e-6)


def test_averaging_changes_no_bit_of_the_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    evaluation = {"every": 3, "sample_prompts": ["Ada"], "sample_tokens": 3}
    train(make_recipe(eval=evaluation))
    train(make_recipe(eval=evaluation, ema={"decay": 0.9}, run={"dir": str(tmp_path / "averaged")}))
    raw = [line for line in evaluations(tmp_path / "averaged") if line["weights"] == "raw"]
    assert raw == evaluations(tmp_path / "run")
    assert len(evaluations(tmp_path / "averaged")) == 2 * len(raw) == 6
    assert_equal(*(load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "averaged")))


@pytest.mark.parametrize(
    "background", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["background", "foreground"]
)
def test_a_run_that_goes_on_has_the_same_averages_to_the_bit(
    make_recipe: MakeRecipe, tmp_path: Path, background: bool
) -> None:
    settings = {**AVERAGED, "checkpoint": {"every": 3, "keep_last": 9, "background": background}, "eval": {"every": 4}}
    train(make_recipe(**settings))
    again = make_recipe(**settings, run={"dir": str(tmp_path / "again")})
    train(again, resume=tmp_path / "run" / "step-00000003")
    assert_equal(averages(tmp_path / "run", 8), averages(tmp_path / "again", 8))
    assert_equal(*(load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "again")))
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "again")


def test_a_rollback_takes_the_averages_back(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same averages as in a run that was never dealt the data."""
    original = steps.accumulate_gradients

    def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
        loss = original(model, objective, pieces, **settings)
        return loss * 10 if pieces[0].first_sample == 16 else loss

    monkeypatch.setattr(steps, "accumulate_gradients", accumulate)
    settings = {**AVERAGED, "checkpoint": {"every": 3}}
    train(make_recipe(**settings, spike={"action": "rollback", "window": 3}))
    monkeypatch.undo()
    dealt = steps.micro_batches

    def without(stream: Any, *, first_sample: int, **settings: Any) -> Any:
        return dealt(stream, first_sample=first_sample + 8 * (first_sample >= 12), **settings)

    monkeypatch.setattr(steps, "micro_batches", without)
    train(make_recipe(**settings, run={"dir": str(tmp_path / "never")}))
    assert_equal(averages(tmp_path / "run", 8), averages(tmp_path / "never", 8))


def test_the_loss_of_the_averages_decides_where_they_are_exported(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"ema": {"decay": 0.5}, "eval": {"every": 2, "patience": 9}, "checkpoint": {"every": 2, "keep_last": 9}}
    result = train(make_recipe(**settings, export={"weights": "ema"}))
    losses = {(line["step"], line["weights"]): line["loss"] for line in evaluations(tmp_path / "run")}
    for step in (2, 4, 6, 8):
        state = read_state(tmp_path / "run" / f"step-{step:08d}")
        assert state.validation_loss == losses[step, "ema"] != losses[step, "raw"]
        assert state.judge == "validation, averaged weights"
    assert result.validation_loss == losses[8, "ema"]
    assert f"averaged weights {losses[8, 'ema']:.4f}" in capsys.readouterr().err
    train(make_recipe(**settings, train={"steps": 10}))  # now the weights as they are decide
    assert "what decides was validation, averaged weights, is validation: patience" in capsys.readouterr().err
    assert read_state(tmp_path / "run" / "step-00000010").early_stopping[1] == 10


@pytest.mark.slow
def test_averages_of_an_adapter_and_of_weights_that_are_rounded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """They are of what is trained, they compute, and they are what is exported."""
    train(make_recipe(run={"dir": str(tmp_path / "base")}))
    settings = {**AVERAGED, "eval": {"every": 8}}
    rounded = make_recipe(**settings, quantization={"scheme": "w8a16"}, run={"dir": str(tmp_path / "rounded")})
    plain = make_recipe(**settings, run={"dir": str(tmp_path / "adapter")})
    base = plain.model.model_validate({"init_from": str(tmp_path / "base")})
    adapted = plain.model_copy(update={"model": base, "adapter": AdapterSettings(rank=2)})
    for recipe, file in ((rounded, "model.safetensors"), (adapted, "adapter_model.safetensors")):
        train(recipe)
        raw, averaged = evaluations(recipe.run.dir)
        assert raw["loss"] != averaged["loss"]
        last, final = (load_file(recipe.run.dir / name / file) for name in ("step-00000008", "final"))
        found = averages(recipe.run.dir, 8)
        assert len(final) == len(last) == len(found)
        assert not all(torch.equal(final[key], last[key]) for key in final)
        totals = [sum(float(tensor.double().sum()) for tensor in tensors.values()) for tensors in (final, found)]
        assert totals[0] == pytest.approx(totals[1])


def test_a_step_is_exported_with_its_weights_or_their_average(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(**AVERAGED, train={"steps": 4}))
    run = tmp_path / "run"
    for ema, expected in ((True, run / "final"), (False, run / "step-00000004")):
        export(run / "step-00000004", tmp_path / str(ema), ema=ema)
        assert_equal(*(load_file(folder / "model.safetensors") for folder in (tmp_path / str(ema), expected)))
        assert (tmp_path / str(ema) / "tokenizer.json").is_file()


@pytest.mark.slow
def test_averaging_may_begin_in_a_run_that_goes_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(train={"steps": 3}))
    train(make_recipe(train={"steps": 4}, ema={"decay": 0.9}))
    before = load_file(tmp_path / "run" / "step-00000003" / "model.safetensors")
    after = load_file(tmp_path / "run" / "step-00000004" / "model.safetensors")
    for name, found in averages(tmp_path / "run", 4).items():
        key = name if name == "lm_head.weight" else f"model.{name}"
        torch.testing.assert_close(found, 2 / 11 * before[key] + 9 / 11 * after[key], rtol=1e-5, atol=1e-7)


def test_applied_gives_the_weights_back_whatever_happens() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, EmaSettings(decay=0.9))
    with torch.no_grad():
        module.weight.add_(1.0)
    before, pointer = module.weight.detach().clone(), module.weight.data_ptr()
    seen = []

    def fail() -> None:
        with ema.applied():
            seen.append(module.weight.detach().clone())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    torch.testing.assert_close(seen[0], before - 1.0)
    assert torch.equal(module.weight, before)
    assert module.weight.data_ptr() == pointer
    with pytest.raises(CheckpointError, match=r"2 tensors differ, first 'bias'"):
        ema.load_state({"weight": torch.zeros(3, 2)}, updates=1)


def test_settings_without_effect_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(UsageError, match=r"ema: warmup_steps has no effect with decay = 0"):
        make_recipe(ema={"warmup_steps": 5})
    with pytest.raises(UsageError, match=r'export\.weights = "ema" needs an average of the weights; set ema\.decay'):
        make_recipe(export={"weights": "ema"})


def test_a_checkpoint_of_the_version_before_goes_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One without average, sets and energy is read as that."""
    train(make_recipe(train={"steps": 3}))
    folder = tmp_path / "run" / "step-00000003" / "state"
    facts = json.loads((folder / "trainer.json").read_text())
    old = {key: value for key, value in facts.items() if key not in ("judge", "ema_updates", "energy")}
    (folder / "trainer.json").write_text(json.dumps({**old, "version": 2}))
    state = read_state(folder.parent)
    assert (state.judge, state.ema_updates) == ("validation", 0)
    assert state.energy == (0.0, 0.0, facts["seconds"])
