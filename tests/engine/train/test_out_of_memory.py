"""Memory that runs out: true errors of the allocators, one line that says what to make smaller, the checkpoint kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trine.engine.errors import OutOfMemoryError
from trine.engine.train import loop
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.out_of_memory import found_in
from trine.engine.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def greedy_torch() -> None:
    torch.empty(2**58, dtype=torch.uint8)


def greedy_numpy() -> None:
    np.empty(2**58, dtype=np.uint8)


def full_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


KINDS = {
    "torch on the CPU": (greedy_torch, r"can't allocate memory"),
    "numpy": (greedy_numpy, r"Unable to allocate"),
    "a GPU": (full_gpu, r"CUDA out of memory"),
}


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """`greedy(take)`: the sixth step takes more memory than there is."""
    original = steps.accumulate_gradients

    def arrange(take: Callable[[], None]) -> None:
        def accumulate(model: Any, objective: Any, pieces: Any, **settings: Any) -> Tensor:
            loss = original(model, objective, pieces, **settings)
            if pieces[0].first_sample == 20:
                take()
            return loss

        monkeypatch.setattr(steps, "accumulate_gradients", accumulate)

    return arrange


@pytest.mark.parametrize(
    "kind", ["torch on the CPU", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("numpy", "a GPU"))]
)
def test_a_step_without_room_names_the_piece_and_leaves_the_checkpoint(
    kind: str, make_recipe: MakeRecipe, tmp_path: Path, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, said = KINDS[kind]
    greedy(take)
    recipe = make_recipe(checkpoint={"every": 2})
    with pytest.raises(OutOfMemoryError) as caught:
        train(recipe)
    message = str(caught.value)
    assert "step 6 ran out of memory on cpu with train.micro_batch_size = 4 sequences of 32 tokens" in message
    assert "set train.micro_batch_size=2: the same batch in more pieces" in message
    assert f"the last checkpoint is {tmp_path / 'run' / 'step-00000004'}" in message
    assert said.replace("\\", "") in message
    assert "\n" not in message
    end = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (end["kind"], end["step"], end["reason"]) == ("end", 5, "out-of-memory")
    monkeypatch.undo()
    assert train(make_recipe(checkpoint={"every": 2}, train={"micro_batch_size": 2})).reason == "finished"


def test_the_remedy_fits_what_is_already_small(make_recipe: MakeRecipe, tmp_path: Path, greedy: Any) -> None:
    greedy(greedy_torch)
    with pytest.raises(OutOfMemoryError, match=r"train\.checkpoint_activations=true.*no checkpoint was written yet"):
        train(make_recipe(train={"micro_batch_size": 1}))
    with pytest.raises(OutOfMemoryError, match=r"a piece is one sequence already: shorten data\.seq_len"):
        train(
            make_recipe(
                train={"micro_batch_size": 1, "checkpoint_activations": True}, run={"dir": str(tmp_path / "other")}
            )
        )


def test_a_model_without_room_says_what_it_needs(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "make_subject", lambda _: greedy_torch())
    with pytest.raises(OutOfMemoryError, match=r"no room on cpu for the weights .*takes about .* there is .*--dry-run"):
        train(make_recipe())
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    assert not found_in(RuntimeError("shape mismatch"))
    assert not found_in(ValueError("DefaultCPUAllocator"))
    assert found_in(MemoryError())
    for take, said in KINDS.values():
        with pytest.raises((RuntimeError, MemoryError), match=said) as caught:
            take()
        assert found_in(caught.value)
