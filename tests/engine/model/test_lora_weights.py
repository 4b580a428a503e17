"""Gradients of an adapter on a quantized base are those on the weights that its codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.model.checkpoint import load_model
from trine.engine.model.layers import Linear
from trine.engine.model.lora_base import identify
from trine.engine.model.lora_weights import LoraWeights
from trine.engine.model.quantized.layers import install
from trine.engine.model.quantized.scheme import SCHEMES, Scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.rtn import quantize_rtn

PairFor = Callable[[str], Any]
BASES: dict[str, Scheme] = {
    "w4a16": Scheme(bits=4, strategy="group", group_size=32),
    "w4a16-asymmetric": Scheme(bits=4, strategy="group", group_size=32, symmetric=False),
    "w8a16": SCHEMES["w8a16"],
}


def on_codes(folder: Path, scheme: Scheme) -> tuple[Transformer, Transformer]:
    """A model with its layers quantized, and one in float64 with the weights that the codes stand for."""
    model, exact = load_model(folder), load_model(folder, dtype=torch.float64)
    for name, layer in list(exact.named_modules()):
        if isinstance(layer, Linear) and name.startswith("layers."):
            weight = quantize_rtn(layer.weight.detach().float(), scheme)
            install(model, name, weight.weight())
            with torch.no_grad():
                layer.weight.copy_(weight.dequantize(torch.float64))
    return model, exact


def gradients(
    model: Transformer,
    folder: Path,
    ids_BT: torch.Tensor,
    *,
    targets: list[str],
    dtype: torch.dtype,
    checkpointed: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states and the gradients of the sum of their squares, in the adapter's parameters."""
    adapter = LoraWeights.new(model.config, rank=4, alpha=8.0, targets=targets, base=identify(folder))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    adapter.to(dtype).attach(model)
    hidden = model(ids_BT, checkpoint_activations=checkpointed)
    hidden.square().sum().backward()
    return hidden.detach(), {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    ("targets", "checkpointed"), [(["q_proj", "o_proj", "up_proj", "down_proj"], False), (["k_proj"], True)]
)
def test_gradients_on_a_quantized_base(
    name: str, targets: list[str], checkpointed: bool, make_pair: PairFor, sample_ids: torch.Tensor
) -> None:
    folder = make_pair("llama3_gqa").folder
    ids_BT = sample_ids[:, :24]
    model, exact = on_codes(folder, BASES[name])
    found, ours = gradients(model, folder, ids_BT, targets=targets, dtype=torch.float32, checkpointed=checkpointed)
    expected, theirs = gradients(exact, folder, ids_BT, targets=targets, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        scale = float(theirs[key].abs().max())
        assert scale > 0
        torch.testing.assert_close(gradient.double(), theirs[key], rtol=0, atol=2e-5 * scale, msg=key)
    assert all(parameter.grad is None for parameter in model.parameters())
