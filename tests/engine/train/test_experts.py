"""A recipe's mixture of experts: its sizes, the losses of its routers, and what they do to a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.config import parse
from trine.engine.errors import UsageError
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe, recipe_table
from trine.engine.train.recipe_model import AdapterSettings, ExpertSettings, ModelSettings
from trine.engine.train.resolve import resolve

MakeRecipe = Callable[..., Recipe]


def sizes(family: str, **given: int) -> dict[str, Any]:
    return {"family": family, "width": 48, "num_layers": 2, "num_heads": 2, **given}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (sizes("qwen3_moe"), (8, 2, 64, None, 128)),
        (sizes("mixtral"), (8, 2, 64, None, 64)),
        (sizes("mixtral", ffn_width=40), (8, 2, 40, None, 40)),
        (sizes("gpt_oss", expert_width=40), (8, 2, 40, None, 40)),
        (sizes("olmoe", num_experts=4, experts_per_token=1, expert_width=24), (4, 1, 24, None, 24)),
        (sizes("qwen2_moe", num_experts=6, ffn_width=80), (6, 2, 40, 80, 80)),
        (sizes("qwen2_moe", expert_width=32, shared_expert_width=16), (8, 2, 32, 16, 128)),
        (sizes("qwen3_moe", experts_per_token=12), (12, 12, 16, None, 128)),
    ],
)
def test_sizes_of_a_new_model(
    make_recipe: MakeRecipe, model: dict[str, Any], expected: tuple[int, int, int, int | None, int]
) -> None:
    setup = resolve(make_recipe(model=model))
    moe = setup.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.ffn_width, moe.shared_width, setup.config.ffn_width) == expected
    again = parse(Recipe, recipe_table(setup.recipe), origin="test")
    assert resolve(again).config == setup.config
    assert again.experts is not None
    assert (again.experts.balance_loss, again.experts.z_loss) == (0.01, 0.001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": sizes("llama", num_experts=4)}, "model.num_experts has no effect with family 'llama'"),
        ({"model": sizes("mixtral", shared_expert_width=4)}, "without an expert that every token goes to"),
        ({"model": sizes("mixtral", ffn_width=32, expert_width=40)}, "are one width in a mixtral model"),
        ({"model": sizes("mixtral", num_experts=2, experts_per_token=3)}, "top_k is 3, but there are 2 experts"),
        ({"experts": {"balance_loss": 0.1}}, r"\[experts\] has no effect with a llama model; take one of mixtral, "),
        ({"experts": {"z_loss": -1.0}}, "experts.z_loss"),
        ({"adapter": {}, "experts": {}}, r"\[adapter\] needs model.init_from"),
    ],
)
def test_what_cannot_be_is_refused(make_recipe: MakeRecipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(make_recipe(**changes))


def test_an_adapter_leaves_routers_as_they_are(make_recipe: MakeRecipe) -> None:
    table = {**recipe_table(make_recipe()), "model": {"init_from": "x"}, "adapter": {}, "experts": {}}
    with pytest.raises(UsageError, match=r"\[experts\] teaches routers, which \[adapter\] freezes; leave out one"):
        parse(Recipe, table, origin="test")


def test_the_resolved_recipe_of_an_adapter_can_be_read_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    base = tmp_path / "base"
    train(make_recipe(model=sizes("mixtral", num_experts=4), train={"steps": 3}, run={"dir": str(base)}))
    model = ModelSettings(init_from=base / "final")
    given = make_recipe().model_copy(update={"model": model, "adapter": AdapterSettings(rank=4)})
    resolved = resolve(given).recipe
    assert resolved.experts is None
    assert parse(Recipe, recipe_table(resolved), origin="test") == resolved


def test_routers_learn_to_share_tokens_out(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    steps: dict[float, list[dict[str, Any]]] = {}
    for balance in (0.0, 0.1):
        folder = tmp_path / str(balance)
        train(
            make_recipe(
                model=sizes("mixtral", num_experts=4, expert_width=16), log={"every": 10}, train={"steps": 40},
                experts={"balance_loss": balance, "z_loss": 1e-9}, run={"dir": str(folder)},
            )
        )  # fmt: skip
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        steps[balance] = [line for line in lines if line["kind"] == "step"]
    assert steps[0.0][0]["loss"] == steps[0.1][0]["loss"]
    alone, balanced = steps[0.0][-1], steps[0.1][-1]
    assert balanced["expert_balance"] < alone["expert_balance"]
    assert 1 <= balanced["busiest_expert"] < alone["busiest_expert"] <= 2
    assert steps[0.1][-1]["router_z"] > 0


def test_a_checkpoint_is_trained_further_without_the_losses(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train(make_recipe(model=sizes("qwen3_moe", num_experts=4), train={"steps": 3}, run={"dir": str(first)}))
    recipe = make_recipe()
    model = ModelSettings(init_from=first / "final")
    for given, expected in ((None, (0.0, 0.0)), (ExpertSettings(z_loss=0.1), (0.0, 0.1))):
        experts = resolve(recipe.model_copy(update={"model": model, "experts": given})).recipe.experts
        assert experts is not None
        assert (experts.balance_loss, experts.z_loss) == expected
