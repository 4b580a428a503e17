"""What a run with an adapter, rounding or a teacher costs is counted, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

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
