"""Weights of a model's layers as compiled decoding steps read them (`cpu_step.py`): joined, and where they lie.

Layers on one input (q, k, v; gate, up) come to lie side by side in memory, which the layers then share: nothing is held
twice. Codes of quantized layers are read as they are; products of more rows than the loops take are those of the
model's own layers.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trine.engine.model.layers import Linear
from trine.engine.model.quantized.layers import QuantizedLinear
from trine.kernels.cpu.projection import SHORTEST, AnyProjection, LanesProjection, Product, Projection
from trine.kernels.quantized.op import Weight, quantized_linear
from trine.kernels.quantized.packing import PackedWeight
from trine.kernels.quantized.packing import can_join as can_join_packed
from trine.kernels.quantized.packing import join as join_packed
from trine.kernels.quantized.scaled_weight import ScaledWeight
from trine.kernels.quantized.scaled_weight import can_join as can_join_scaled
from trine.kernels.quantized.scaled_weight import join as join_scaled


def why_not_joined(layers: Sequence[nn.Module]) -> str | None:
    """Why the loops cannot multiply by these layers, which have one input; None where they can."""
    if {type(layer) for layer in layers} == {Linear}:
        return None
    weights = _weights(layers)
    if len(weights) < len(layers):
        return "the model has layers on one input of which some are quantized"
    if any(layer.order_K is not None for layer in layers if isinstance(layer, QuantizedLinear)):
        return "the model's weights have their columns in another order"
    for weight in weights:
        if isinstance(weight, PackedWeight) and weight.lanes is None:
            return f"the model has weights in the layout {weight.layout}"
        if isinstance(weight, ScaledWeight) and (weight.codes.dtype != weight.kind or weight.packed):
            return f"the model has weights in {weight.kind}, kept in {weight.codes.dtype}"
        if isinstance(weight, ScaledWeight) and weight.width < SHORTEST:
            return f"the model has weights in {weight.kind} [{weight.num_features}, {weight.width}]"
    packed, scaled = _kinds(weights)
    alike = len(weights) == 1 or (can_join_packed(packed) if packed else can_join_scaled(scaled))
    return None if alike and not (packed and scaled) else "the model has layers on one input that are quantized unlike"


def rounds_inputs(layers: Sequence[nn.Module]) -> bool:
    """Whether one of the layers rounds what it multiplies to codes."""
    return any(isinstance(weight, ScaledWeight) for weight in _weights(layers))


def joined(layers: Sequence[nn.Module], dtype: torch.dtype) -> AnyProjection:
    """The layers' weights as one, which the layers share from then on. `dtype`: of the products of many rows."""
    biases = [layer.bias.detach() for layer in layers if isinstance(layer.bias, Tensor)]
    assert len(biases) in (0, len(layers))
    bias = torch.cat(biases) if biases else None
    plain = [layer for layer in layers if isinstance(layer, Linear)]
    if plain:
        return Projection(_join_plain(plain), bias=bias)
    whole = _join(layers)
    if isinstance(whole, PackedWeight):
        assert whole.lanes is not None
        return LanesProjection(whole.lanes, bias, _product(whole, bias, dtype))
    scales = whole.scales if whole.blocked else whole.scales.expand(whole.num_features)
    per_row, product = whole.kind == torch.int8, _product(whole, bias, dtype)
    return Projection(whole.codes, scales, bias, per_row=per_row, product=product, spread=whole.spread)


def _join(layers: Sequence[nn.Module]) -> Weight:
    weights = _weights(layers)
    if len(weights) == 1:
        return weights[0]
    packed, scaled = _kinds(weights)
    both: tuple[Weight, Sequence[Weight]] = join_packed(packed) if packed else join_scaled(scaled)
    whole, parts = both
    for layer, part in zip(layers, parts, strict=True):
        assert isinstance(layer, QuantizedLinear)
        layer.weight = part
    return whole


def _join_plain(layers: Sequence[Linear]) -> Tensor:
    weight = layers[0].weight.detach()
    if len(layers) > 1:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, torch.split(weight, [len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part
    return weight


def _product(weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Product:
    return lambda x_MK: quantized_linear(x_MK.to(dtype), weight, bias)


def _kinds(weights: Sequence[Weight]) -> tuple[list[PackedWeight], list[ScaledWeight]]:
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    return packed, [weight for weight in weights if isinstance(weight, ScaledWeight)]


def _weights(layers: Sequence[nn.Module]) -> list[Weight]:
    return [layer.weight for layer in layers if isinstance(layer, QuantizedLinear)]
