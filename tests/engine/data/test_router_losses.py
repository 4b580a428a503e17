"""Losses of routers are those of transformers and of the formula; they have gradients and are not part of the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.objectives import CausalLM
from trine.engine.data.router_losses import RouterLosses
from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.init import initialize
from trine.engine.model.moe import MixtureOfExperts, RouterWatch
from trine.engine.model.transformer import Transformer


def make(num_layers: int = 2) -> Transformer:
    moe = MoeConfig(num_experts=4, top_k=2, ffn_width=16, renormalise=True)
    model = Transformer(
        ModelConfig(
            family="mixtral", vocab_size=50, width=16, num_layers=num_layers, num_heads=2, num_kv_heads=2, head_dim=8,
            ffn_width=16, max_positions=32, init_std=0.3, moe=moe,
        )
    )  # fmt: skip
    initialize(model, 1)
    return model.double()


@pytest.fixture
def batch() -> Batch:
    ids_BT = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT=ids_BT, targets_BT=ids_BT.roll(-1, 1), segment_ids_BT=None, positions_BT=None, num_valid=24)


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_the_balance_of_one_layer_is_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    watch = RouterWatch()
    watch.see(logits, logits.topk(2, dim=-1).indices)
    expected = load_balancing_loss_func((logits.flatten(0, 1),), num_experts=6, top_k=2)
    torch.testing.assert_close(watch.balance[0] * 2, torch.as_tensor(expected))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_gradients_are_those_of_the_formula(batch: Batch, checkpoint_activations: bool) -> None:
    model = make()
    objective = RouterLosses(CausalLM(), balance=0.3, z=0.05)
    loss, count = objective.loss(model, batch, checkpoint_activations=checkpoint_activations)
    loss.backward()
    found = gradients(model)
    plain, _ = CausalLM().loss(model, batch)
    assert torch.equal(loss.detach(), plain.detach())

    logits: list[Tensor] = []
    gates = [module.gate for module in model.modules() if isinstance(module, MixtureOfExperts)]
    handles = [gate.register_forward_hook(lambda _module, _inputs, output: logits.append(output)) for gate in gates]
    hidden = model(batch.ids_BT)
    for handle in handles:
        handle.remove()
    total = cross_entropy((hidden @ model.head_weight.T).flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    balances, squares, busiest = [], [], []
    for layer in logits:
        chosen = layer.topk(2, dim=-1).indices.flatten(0, 1)
        tokens = torch.stack([(chosen == expert).sum() for expert in range(4)])
        balances.append(4 * (tokens / 24 * layer.softmax(-1).flatten(0, 1).mean(0)).sum() / 2)
        squares.append(layer.logsumexp(-1).square().mean())
        busiest.append(float(tokens.max()) / 12)
    balance, square = torch.stack(balances).mean(), torch.stack(squares).mean()
    (total + count * (0.3 * balance + 0.05 * square)).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    measures = objective.measures()
    assert measures["expert_balance"] == pytest.approx(float(balance.detach()))
    assert measures["router_z"] == pytest.approx(float(square.detach()))
    assert measures["busiest_expert"] == pytest.approx(max(busiest))
    assert objective.measures() == {}


def test_forward_passes_without_gradients_and_those_of_others_are_not_seen(batch: Batch) -> None:
    model = make()
    objective = RouterLosses(CausalLM(), balance=0.3, z=0.0)
    objective.loss(model, batch)
    seen: dict[str, Any] = objective.measures()
    objective.loss(model, batch)
    CausalLM().loss(model, batch)
    with torch.no_grad():
        model(batch.ids_BT)
    assert objective.measures() == seen


def test_padding_does_not_count(batch: Batch) -> None:
    """Rows filled up with tokens that are all alike, which go to the same experts, measure as they did before."""
    model, found = make(), []
    ids_BT, targets_BT = pad(batch.ids_BT, (0, 7), value=3), pad(batch.targets_BT, (0, 7), value=IGNORED)
    for one in (batch, replace(batch, ids_BT=ids_BT, targets_BT=targets_BT, padding=14)):
        objective = RouterLosses(CausalLM(), balance=0.3, z=0.05)
        loss, _ = objective.loss(model, one)
        loss.backward()
        found.append((objective.measures(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0])
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-6, atol=1e-9, msg=name)
