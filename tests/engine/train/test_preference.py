"""Preferences through the trainer: measured from where it began, learned, resumed to the bit, refused by name."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trine.engine.data.dpo import Preference, answer_log_probs
from trine.engine.errors import DataError, TrineError
from trine.engine.text.chat_styles import STYLES
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train import loop
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.report import write_report
from trine.engine.train.resolve import resolve
from trine.engine.train.run_log import read_run
from trine.engine.train.step import accumulate_gradients, count_valid, micro_batches
from trine.engine.train.subject import Subject, make_subject

MakeRecipe = Callable[..., Recipe]
REWARDS = {"reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"}
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "adapter": {"adapter": {"rank": 4, "dropout": 0.1}}}


@pytest.fixture
def base(objective_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A tiny decoder after some steps on conversations."""
    chat = {"kind": "chat", "chat_template": "plain"}
    train(objective_recipe(tmp_path / "base", "llama", objective=chat, data={"seq_len": 128}, eval={"every": 0}))
    return tmp_path / "base" / "final"


@pytest.fixture
def recipe_of(objective_recipe: MakeRecipe, base: Path, tmp_path: Path) -> MakeRecipe:
    """`recipe_of("name", section={...})`: preferences, beginning at the base."""

    def make(name: str = "run", **changes: Any) -> Recipe:
        objective = {"kind": "preference", **changes.pop("objective", {})}
        data = {"seq_len": 128, "packing": True, **changes.pop("data", {})}
        model = {"init_from": str(base), **changes.pop("model", {})}
        return objective_recipe(tmp_path / name, model, objective=objective, data=data, **changes)

    return make


def logged(run: Path, *kinds: str) -> list[dict[str, Any]]:
    times = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "joules"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in times} for one in lines if one["kind"] in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_preferred_is_learned_from_no_preference_at_first(
    kind: str, recipe_of: MakeRecipe, tmp_path: Path
) -> None:
    long = {
        "train": {"steps": 24, "batch_size": 8, "micro_batch_size": 4},
        "optim": {"lr": 1e-2},
        "eval": {"every": 12},
    }
    settings = {name: {**value, "dropout": 0.0} for name, value in KINDS[kind].items()}
    train(recipe_of(**long, **settings))
    log = read_run(tmp_path / "run")
    assert log.steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(log.steps[0]["reward_margin"]) < 1e-5
    assert log.steps[-1].keys() >= REWARDS
    last = log.evaluations[-1]
    assert last["loss"] < 0.9 * math.log(2)
    assert last["reward_accuracy"] > 0.9
    assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], rel=1e-4)
    assert last["tokens"] == 24
    assert (log.loss_unit, log.terms) == ("nats per pair", "pairs")
    page = write_report(tmp_path / "run").read_text()
    for shown in ("Reward accuracy", "Reward margin", "Reward of chosen answers"):
        assert shown in page
    final = tmp_path / "run" / "final"
    assert Tokenizer.load(final).chat_template == STYLES["plain"]
    assert "trained on preferences" in (final / "README.md").read_text() or kind == "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_to_the_bit(
    kind: str, recipe_of: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**KINDS[kind], "model": {"dropout": 0.1}, "optim": {"lr": 1e-2}}
    assert train(recipe_of("whole", **changes)).reason == "finished"
    original = loop.Trainer._one_step

    def one_step(self: loop.Trainer, *args: Any) -> None:
        original(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Trainer, "_one_step", one_step)
    parts = recipe_of("parts", **changes)
    assert train(parts).reason == "interrupted"
    assert train(parts).reason == "finished"
    assert logged(tmp_path / "parts", "step", "eval") == logged(tmp_path / "whole", "step", "eval")
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    ours, theirs = (load_file(tmp_path / run / "final" / name) for run in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def prepared(recipe: Recipe) -> tuple[Any, Subject, Preference]:
    setup = resolve(recipe)
    subject = make_subject(setup)
    assert isinstance(subject.objective, Preference)
    return setup, subject, subject.objective


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_what_the_run_began_with(kind: str, recipe_of: MakeRecipe) -> None:
    """Whatever is trained, and without dropout; the trained one is in training mode again afterwards."""
    setup, subject, objective = prepared(recipe_of(model={"dropout": 0.2}, **KINDS[kind]))
    batch = setup.stream.batch(0, 4)
    found = []
    subject.model.train()
    for _ in range(2):
        with torch.no_grad(), objective.reference(subject.model) as reference:
            found.append(answer_log_probs(reference, batch))
        assert subject.model.training
        with torch.no_grad():
            for parameter in subject.trained.parameters():
                parameter.add_(0.1)
    assert torch.equal(found[0], found[1])
    with torch.no_grad():
        subject.model.eval()
        assert not torch.allclose(answer_log_probs(subject.model, batch), found[0], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_change_no_gradient(kind: str, recipe_of: MakeRecipe) -> None:
    found = []
    for size in (8, 2):
        settings = {name: {**value, "dropout": 0.0} for name, value in KINDS[kind].items()}
        setup, subject, _ = prepared(recipe_of(train={"batch_size": 8, "micro_batch_size": size}, **settings))
        if kind == "adapter":  # half of a new one is zero, so that nothing would reach the other half
            for parameter in subject.trained.parameters():
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        pieces = micro_batches(setup.stream, first_sample=0, batch_size=8, micro_batch_size=size)
        loss = accumulate_gradients(
            subject.model, subject.objective, pieces, num_valid=count_valid(pieces), seed=0,
            compute_dtype=torch.float32, checkpoint_activations=size == 2,
        )  # fmt: skip
        gradients = [one.grad for one in subject.trained.parameters() if one.grad is not None]
        found.append((loss, torch.cat([gradient.flatten() for gradient in gradients])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=2e-6)


def test_another_reference_is_refused_when_a_run_is_continued(
    recipe_of: MakeRecipe, objective_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(train={"steps": 2}, eval={"every": 0})
    train(recipe)
    again = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 3})})
    other = {"objective": {"kind": "chat", "chat_template": "plain"}, "data": {"seq_len": 128}, "train": {"seed": 1}}
    train(objective_recipe(tmp_path / "other", "llama", **other, eval={"every": 0}))
    shutil.copyfile(tmp_path / "other" / "final" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(DataError, match=r"or what preferences are measured from\) is not what"):
        train(again)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"objective": {"label_smoothing": 0.5}}, r"label_smoothing = 0.5 takes half of the pairs or more to be the wrong"),
    ({"objective": {"beta": 0.0}}, r"objective.beta = 0.0 should be greater than 0"),
    ({"objective": {"train_on": "last"}}, r'train_on has no effect with kind = "preference"; it belongs to \'chat\''),
    ({"adapter": {"init_from": "x"}}, r"adapter.init_from would count as learned; merge it first"),
    ({"quantization": {"scheme": "w4a16"}}, r'\[quantization\] goes with objective.kind "causal_lm", "chat", not'),
    ({"distill": {"teacher": "x"}}, r'\[distill\] goes with objective.kind "causal_lm", "chat", not "preference"'),
    ({"data": {"seq_len": 12}}, r"train.jsonl:\d+: the conversation has \d+ tokens"),
    ({"data": {"path": "{}/texts.jsonl"}}, r"texts.jsonl:1: no field 'chosen'"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_cannot_be_is_refused_in_one_line(number: int, recipe_of: MakeRecipe, objectives_dir: Path) -> None:
    changes, message = BAD[number]
    if "path" in changes.get("data", {}):
        changes = {"data": {"path": changes["data"]["path"].format(objectives_dir)}}
    with pytest.raises(TrineError, match=message) as refused:
        resolve(recipe_of(**changes))
    assert "\n" not in str(refused.value)


def test_preferences_need_a_model_to_begin_with(objective_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(TrineError, match=r'"preference" measures from the checkpoint .* give model.init_from'):
        objective_recipe(tmp_path / "run", "llama", objective={"kind": "preference"})
