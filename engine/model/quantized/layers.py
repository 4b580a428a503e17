"""Quantized layers in the place of a built model's own. The model does not know.

`install` puts one weight into a model: the `Linear` of that name becomes a `QuantizedLinear`, and a feed-forward layer
that holds one a `QuantizedMLP`, because `MLP` multiplies with its layers' weights itself. Names of biases and of layers
stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trine.engine.errors import UsageError
from trine.engine.model.blocks import MLP
from trine.engine.model.layers import Linear
from trine.engine.model.quantized.coded import CodedLinear
from trine.engine.model.quantized.experts import QuantizedExperts
from trine.engine.model.quantized.table import QuantizedEmbedding
from trine.kernels.mlp.activation import activate, gated
from trine.kernels.quantized.op import Weight, quantized_gated, quantized_linear
from trine.kernels.quantized.packing import PackedWeight
from trine.kernels.quantized.scaled_weight import ScaledWeight


class QuantizedLinear(nn.Module):
    """y = x W^T + bias, in the dtype of x. `weight` is what `pack` or `scaled_weight` made of codes and scales.

    W has no parameter and no gradient. `layer.to(device)` moves it; a change of dtype leaves it. With `order_K` (int64)
    column j of the weight multiplies input `order_K[j]`.
    """

    def __init__(self, weight: Weight, bias: nn.Parameter | None, order_K: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.order_K = order_K

    def forward(self, x: Tensor, *, deterministic: bool = False) -> Tensor:
        """Raises `UsageError` in the deterministic mode, which is that of training, where weights are not codes."""
        self.refuse(deterministic)
        return quantized_linear(self.ordered(x), self.weight, self.bias)

    def ordered(self, x: Tensor) -> Tensor:
        """x with its features in the order of the weight's columns."""
        return x if self.order_K is None else x.index_select(-1, self.order_K)

    def refuse(self, deterministic: bool) -> None:
        """Raises `UsageError` for the deterministic mode."""
        if deterministic:
            raise UsageError("deterministic=True with a quantized model; leave it out, or give the original checkpoint")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        where = fn(torch.empty(0, device=self.weight.device)).device
        if where.type != "meta":
            self.weight = self.weight.to(where)
            self.order_K = None if self.order_K is None else self.order_K.to(where)
        return self

    def extra_repr(self) -> str:
        return f"{type(self.weight).__name__} [{self.weight.num_features}, {self.weight.width}]"


class QuantizedMLP(nn.Module):
    """What `MLP` computes, by its own layers, of which some are quantized."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        assert isinstance(mlp, MLP)
        self.activation = mlp.activation
        self.gate_proj: nn.Module | None = mlp.gate_proj
        self.up_proj: nn.Module = mlp.up_proj
        self.down_proj: nn.Module = mlp.down_proj

    def forward(self, x: Tensor, deterministic: bool = False) -> Tensor:
        y: Tensor = self.down_proj(self._inner(x, deterministic), deterministic=deterministic)
        return y

    def _inner(self, x: Tensor, deterministic: bool) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear) and _alike(gate, up):
            gate.refuse(deterministic)
            return quantized_gated(
                gate.ordered(x),
                gate.weight,
                up.weight,
                activation=self.activation,
                gate_bias=gate.bias,
                up_bias=up.bias,
            )
        up_x = up(x, deterministic=deterministic)
        if gate is None:
            return activate(up_x, self.activation)
        return gated(gate(x, deterministic=deterministic), up_x, self.activation)


def _alike(gate_layer: QuantizedLinear, up_layer: QuantizedLinear) -> bool:
    """Whether one product can take both; they have one shape."""
    if gate_layer.order_K is not up_layer.order_K:
        return False
    gate, up = gate_layer.weight, up_layer.weight
    if isinstance(gate, PackedWeight) and isinstance(up, PackedWeight):
        same = gate.bits == up.bits and (gate.zeros is None) == (up.zeros is None) and gate.layout == up.layout
        return same and (gate.scales.shape, gate.scales.dtype) == (up.scales.shape, up.scales.dtype)
    if isinstance(gate, ScaledWeight) and isinstance(up, ScaledWeight):
        return (gate.kind, gate.scales.shape) == (up.kind, up.scales.shape)
    return False


def install(model: nn.Module, name: str, weight: Weight, order_K: Tensor | None = None) -> None:
    """Replace the `Linear` of that name by a quantized one with this weight, its columns for the inputs `order_K`."""

    def make(old: Linear, parent: nn.Module) -> QuantizedLinear:
        assert (weight.num_features, weight.width) == tuple(old.weight.shape), name
        return QuantizedLinear(weight, old.bias, _shared(parent, order_K))

    replace_linear(model, name, make)


def replace_linear(model: nn.Module, name: str, make: Callable[[Linear, nn.Module], nn.Module]) -> None:
    """Put what `make` makes of the `Linear` of that name, and of the layer around it, in its place."""
    path, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    if isinstance(parent, MLP):
        parent = QuantizedMLP(parent)
        model.set_submodule(path, parent)
    old = getattr(parent, last)
    assert isinstance(old, Linear), name
    setattr(parent, last, make(old, parent))


def _shared(parent: nn.Module, order_K: Tensor | None) -> Tensor | None:
    """An equal order that another layer there has, so that layers with one input can be seen to share it."""
    for layer in parent.children():
        other_K = layer.order_K if isinstance(layer, QuantizedLinear) else None
        if order_K is not None and other_K is not None and torch.equal(other_K, order_K):
            return other_K
    return order_K


def product_dtype(wanted: torch.dtype | None, stored: torch.dtype) -> torch.dtype:
    """What a model whose weights are codes computes in: `wanted`, or None: the `stored` one, float32 for float64.

    Raises `UsageError` for float64, which no product of codes takes.
    """
    if wanted == torch.float64:
        raise UsageError("float64 with quantized weights, whose products take less; give --dtype float32, or auto")
    return wanted or (torch.float32 if stored == torch.float64 else stored)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model is quantized."""
    kinds = QuantizedLinear | QuantizedExperts | CodedLinear | QuantizedEmbedding
    return any(isinstance(part, kinds) for part in model.modules())
