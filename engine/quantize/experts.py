"""The inputs of each expert of a mixture: of the tokens that went to it alone.

The layers of all experts are one parameter, so there is no module to watch. What the mixture is given is routed here as
it does itself. An expert's layers are called `layers.3.mlp.experts.down_proj:7`.

Shapes: N tokens, E experts, K slots, C width, F feed-forward width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.engine.model.config import ModelConfig
from trine.engine.model.moe import ExpertLinear, MixtureOfExperts
from trine.kernels.mlp.activation import gated, gated_clamped
from trine.kernels.moe.routing import route


def expert_groups(name: str, config: ModelConfig) -> list[list[str]]:
    """The layers of the experts of that name, those together that get the same input."""
    assert config.moe is not None
    found = []
    for expert in range(config.moe.num_experts):
        found += [[f"{name}.gate_proj:{expert}", f"{name}.up_proj:{expert}"], [f"{name}.down_proj:{expert}"]]
    return found


def expert_inputs(
    do: Callable[[str, Tensor], None],
    name: str,
    watched: Collection[str],
    mixture: MixtureOfExperts,
    inputs: tuple[Tensor, ...],
) -> None:
    """Call `do(layer, x)` for the watched layers of every expert that a token of the mixture's input goes to."""
    if not watched:
        return
    x_NC = inputs[0].flatten(0, -2)
    settings, experts = mixture.moe, mixture.experts
    ids_NK, _ = route(mixture.gate(x_NC), settings.top_k, order=settings.order, renormalise=settings.renormalise)
    for expert in torch.unique(ids_NK).tolist():
        x = x_NC[(ids_NK == expert).any(-1)]
        first, last = f"{name}.gate_proj:{expert}", f"{name}.down_proj:{expert}"
        if first in watched:
            do(first, x)
        if last in watched:
            gate, up = (_product(x, layer, expert) for layer in (experts.gate_proj, experts.up_proj))
            limit = settings.limit
            do(last, gated(gate, up, mixture.activation) if limit is None else gated_clamped(gate, up, limit))


def _product(x: Tensor, layer: ExpertLinear, expert: int) -> Tensor:
    bias = None if layer.bias is None else layer.bias[expert].to(x.dtype)
    return F.linear(x, layer.weight[expert].to(x.dtype), bias)
