"""On a GPU, here a pretended one: a training step waits for the device once, and no tensor of the CPU gets into it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from trine.engine.train import step as steps_of
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe

Pretend = Callable[[], AbstractContextManager[Any]]
MakeRecipe = Callable[..., Recipe]
STEPS = 4
# Sections of a recipe, and kernels that only such a run needs.
NEW: dict[str, tuple[dict[str, Any], set[str]]] = {
    "float32": ({}, {"adamw_kernel", "cross_entropy_rows_kernel", "keys_kernel"}),
    "bfloat16": ({"train": {"compute_dtype": "bfloat16"}}, {"adamw_kernel"}),
    "in pieces": ({"train": {"micro_batch_size": 2}}, set()),
    "checkpointing": ({"train": {"checkpoint_activations": True}}, set()),
    "muon": ({"optim": {"name": "muon"}}, {"symmetric_kernel"}),
    "8-bit states": ({"optim": {"state_dtype": "int8"}}, set()),
    "averaged": ({"ema": {"decay": 0.9}}, set()),
    "gpt2 with dropout": ({"model": {"family": "gpt2", "dropout": 0.1}}, set()),
    "experts": ({"model": {"family": "mixtral"}}, {"grouped_matmul_kernel", "gated_backward_kernel"}),
}
CONTINUED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "adapter": ({"adapter": {"rank": 4}}, set()),
    "adapter with dropout": ({"adapter": {"rank": 4, "dropout": 0.1}}, set()),
    "rounded weights": ({"quantization": {"scheme": "w4a16", "group_size": 32}}, set()),
    "rounded activations": ({"quantization": {"scheme": "w8a8"}}, {"quantize_rows_kernel"}),
    "taught": ({"distill": {}}, {"distillation_rows_kernel"}),
}
CHAT = {"kind": "chat", "chat_template": "plain"}
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "masked words": ("bert", {}),
    "classes": ("bert", {"objective": {"kind": "classification"}}),
    "tags": ("bert", {"objective": {"kind": "tagging"}}),
    "spans": ("t5", {}),
    "pairs": ("marian", {"objective": {"kind": "seq2seq"}}),
    "conversations": ("llama", {"objective": CHAT, "data": {"seq_len": 128}}),
}
SLOW = {"in pieces", "8-bit states", "averaged", "adapter with dropout", "rounded weights", "classes", "pairs"}


def some(names: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def on_gpu(changes: dict[str, Any]) -> dict[str, Any]:
    settings = {"device": "cuda", "steps": STEPS, **changes.get("train", {})}
    # What is measured of experts is read where it is logged: after the last step.
    return {"checkpoint": {"every": 0}, "eval": {"every": 0}, "log": {"every": 100}, **changes, "train": settings}


def waits_of_steps(recipe: Recipe, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The waits between the beginnings of steps: of the second one, the third, ..."""
    found: list[list[str]] = []
    real = steps_of.accumulate_gradients

    def begin(*arguments: Any, **fields: Any) -> Any:
        found.append([wait.partition(" at ")[0] for wait in gpu.waits])
        gpu.waits.clear()
        return real(*arguments, **fields)

    monkeypatch.setattr(steps_of, "accumulate_gradients", begin)
    result = train(recipe)
    assert result.reason == "finished"
    return found[2:]  # set-up, and the first step, where tables are made that are kept


def check(recipe: Recipe, kernels: set[str], pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend() as gpu:
        # Loss and norm of the gradient, together.
        assert waits_of_steps(recipe, gpu, monkeypatch) == [["tolist"]] * (STEPS - 2)
        assert set(gpu.kernels) >= {"chunk_kernel", *kernels}


@pytest.mark.parametrize("name", some(NEW))
def test_a_step_of_a_new_model_waits_once(
    pretended_gpu: Pretend, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, kernels = NEW[name]
    check(make_recipe(**on_gpu(changes)), kernels, pretended_gpu, monkeypatch)


@pytest.mark.parametrize("name", some(CONTINUED))
def test_a_step_that_goes_on_from_a_model_waits_once(
    pretended_gpu: Pretend,
    continued: MakeRecipe,
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    changes, kernels = CONTINUED[name]
    if "distill" in changes:
        changes = {"distill": {"teacher": str(bases["llama"])}}
    check(continued(**on_gpu(changes)), kernels, pretended_gpu, monkeypatch)


@pytest.mark.parametrize("name", some(OBJECTIVES))
def test_a_step_of_every_objective_waits_once(
    pretended_gpu: Pretend, objective_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base, changes = OBJECTIVES[name]
    check(objective_recipe(tmp_path / "run", base, **on_gpu(changes)), set(), pretended_gpu, monkeypatch)


def test_pairs_are_read_whole_where_targets_are_generated(
    pretended_gpu: Pretend, objective_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = on_gpu({"objective": {"kind": "seq2seq"}, "eval": {"every": 3, "batch_size": 12}})
    with pretended_gpu() as gpu:
        _, evaluated = waits_of_steps(objective_recipe(tmp_path / "run", "marian", **changes), gpu, monkeypatch)
    # Documents of a row are found on the host; row by row each look would be a wait.
    assert "aten::_unique2" not in evaluated
    assert evaluated.count("copy to the CPU") > 4


@pytest.mark.parametrize("changes", [{}, {"adapter": {"rank": 4}}], ids=["whole", "adapter"])
def test_a_step_of_preferences_waits_once(
    pretended_gpu: Pretend,
    objective_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    quick = {"train": {"steps": 1}, "eval": {"every": 0}, "data": {"seq_len": 128}}
    train(objective_recipe(tmp_path / "base", "llama", objective=CHAT, **quick))
    base = {"init_from": str(tmp_path / "base/final")}
    more = on_gpu({"objective": {"kind": "preference"}, "data": {"seq_len": 128}, **changes})
    check(objective_recipe(tmp_path / "run", base, **more), set(), pretended_gpu, monkeypatch)
