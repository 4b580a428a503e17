"""Every family can be trained from its first weights: the loss falls, and the checkpoint is one that it can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.data.batch import Batch
from trine.engine.data.objectives import CausalLM
from trine.engine.model.checkpoint import load_model
from trine.engine.model.families.registry import DECODERS, FAMILIES, new_config
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.train.loop import train

MakeRecipe = Callable[..., Any]
SIZES = {
    "vocab_size": 61, "width": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "ffn_width": 48,
    "max_positions": 64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_loss_of_every_family_falls(family: str, dtype: torch.dtype) -> None:
    model = Transformer(new_config(family, sizes=SIZES, settings={"sliding_window": 8, "use_sliding_window": True}))
    initialize(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ids = torch.arange(2 * 33).view(2, 33) * 7 % 61
    batch = Batch(ids_BT=ids[:, :-1], targets_BT=ids[:, 1:], segment_ids_BT=None, positions_BT=None, num_valid=64)
    losses = []
    for _ in range(8):
        loss, count = CausalLM().loss(model, batch, compute_dtype=dtype)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / count)
    assert losses[0] == pytest.approx(math.log(61), abs=0.4)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_a_run_of_every_family_leaves_a_checkpoint_of_its_kind(family: str, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(model={"family": family, "num_layers": 4})
    train(recipe)
    run = Path(recipe.run.dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    model = load_model(run / "final")
    assert model.config.family == family
    assert json.loads((run / "final" / "config.json").read_text())["model_type"] == FAMILIES[family].model_types[0]
