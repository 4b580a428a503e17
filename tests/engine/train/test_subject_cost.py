"""What a run with an adapter, rounding or a teacher costs is counted, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trine.engine.model.cost import Work, forward_flops
from trine.engine.train.loop import train
from trine.engine.train.plan import estimate_memory
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import Setup, resolve
from trine.engine.train.subject import make_subject
from trine.engine.train.subject_cost import trained_parameters, training_flops_per_token

MakeRecipe = Callable[..., Recipe]


def products(setup: Setup) -> int:
    """FLOPs of the matrix products in one step of one sample, as torch counts them."""
    subject = make_subject(setup)
    batch = setup.stream.batch(0, 1)
    subject.model.train()
    with FlopCounterMode(display=False) as counter, subject.computing():
        subject.objective.loss(subject.model, batch)[0].backward()
    return counter.get_total_flops()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"adapter": {"rank": 4}},
    "some layers": {"adapter": {"rank": 3, "targets": ["v_proj", "layers.1.mlp.down_proj"]}},
}


@pytest.mark.parametrize("name", CASES)
def test_trained_parameters_are_counted(name: str, continued: MakeRecipe) -> None:
    setup = resolve(continued(**CASES[name]))
    expected = sum(parameter.numel() for parameter in make_subject(setup).trained.parameters())
    assert trained_parameters(setup) == expected


def test_flops_are_those_of_the_products(continued: MakeRecipe, bases: dict[str, Path]) -> None:
    changes = {**CASES, "taught": {"distill": {"teacher": str(bases["llama"]), "weight": 1.0}}}
    setups = {name: resolve(continued(**change)) for name, change in changes.items()}
    counted = {name: products(setup) for name, setup in setups.items()}
    said = {name: training_flops_per_token(setup) * 32 for name, setup in setups.items()}
    config = setups["plain"].config
    # What torch does not see: attention, and of the output layer the gradient of its weight.
    attention, head = 4 * 2 * 32 * 32 * 32, 2 * 32 * config.vocab_size * 32
    assert counted["plain"] == said["plain"] - 3 * attention - head
    assert counted["taught"] - counted["plain"] == said["taught"] - said["plain"] - attention
    # What need not be computed, and is counted by the convention: gradients of the inputs of the first q, k and v.
    first = 2 * 32 * (2 * 32 * 32 + 3 * 4 * 32)
    assert counted["adapter"] == said["adapter"] - 3 * attention - first


OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "masked_lm": ("bert", {}),
    "classification": ("bert", {"kind": "classification"}),
    "tagging": ("bert", {"kind": "tagging"}),
    "span_corruption": ("t5", {}),
    "seq2seq": ("t5", {"kind": "seq2seq"}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_flops_of_every_objective_are_those_of_the_products(
    name: str, objective_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The forward pass, one row at a time so that nothing is padded; sources and targets, hidden tokens and texts."""
    model, objective = OBJECTIVES[name]
    train = {"batch_size": 4, "micro_batch_size": 1}
    setup = resolve(objective_recipe(tmp_path / "run", model, objective=objective, train=train))
    subject = make_subject(setup)
    batches = [setup.stream.batch(first, 1) for first in range(4)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in batches:
            subject.objective.loss(subject.model, batch)
    tokens = sum(batch.num_tokens for batch in batches)
    assert abs(training_flops_per_token(setup) - 3 * counter.get_total_flops() / tokens) <= 0.5


def test_flops_of_next_sentences(objective_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Their rows are padded, and padding is no work of the model's: here it is counted with the rest, as torch does."""
    setup = resolve(objective_recipe(tmp_path / "run", "bert", objective={"kind": "masked_lm", "next_sentence": True}))
    subject = make_subject(setup)
    batch = setup.stream.batch(0, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.objective.loss(subject.model, batch)
    rows, length = batch.ids_BT.shape
    work = Work(tokens=rows * length, length=length, predicted=len(batch.targets_M), texts=rows)
    assert forward_flops(setup.config, work) == counter.get_total_flops()


def test_recomputed_activations_are_not_counted(continued: MakeRecipe) -> None:
    plain, again = (resolve(continued(train={"checkpoint_activations": value})) for value in (False, True))
    assert training_flops_per_token(plain) == training_flops_per_token(again)


def test_memory_of_what_is_not_trained(continued: MakeRecipe, bases: dict[str, Path]) -> None:
    from trine.engine.model.checkpoint import load_model

    plain, adapter, taught, aware = (
        estimate_memory(resolve(continued(**change)))
        for change in (
            {}, {"adapter": {"rank": 4}}, {"distill": {"teacher": str(bases["llama"])}},
            {"quantization": {"scheme": "w8a16"}},
        )
    )  # fmt: skip
    base = sum(parameter.nbytes for parameter in load_model(bases["llama"]).parameters())
    assert (plain.weights, plain.frozen) == (base, 0)
    assert adapter.frozen == taught.frozen == base
    assert adapter.weights == adapter.gradients == 4864 * 4
    assert aware.weights == 2 * base


def test_a_dry_run_says_what_is_trained(continued: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(continued(adapter={"rank": 4}), dry_run=True)
    told = capsys.readouterr().out
    assert "trained 4,864, 11." in told
    assert "and an adapter of 4.86k to train" in told
    assert "frozen" in told
