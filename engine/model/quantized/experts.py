"""The quantized weights of all experts of a layer in the place of the model's own. The model does not know.

`install_experts` puts them into a model: its `Experts` become `QuantizedExperts`, one operation on the codes of all
experts (`kernels/quantized_moe`). Weights alone are codes: inputs stay as they are, whatever the scheme says of them,
because what is read of memory is weights. Names of biases stay as they were.

Shapes: N tokens (any leading dimensions), K slots, E experts, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trine.engine.model.moe import Experts
from trine.kernels.quantized_moe.experts import PackedExperts
from trine.kernels.quantized_moe.op import quantized_moe_mlp


class QuantizedExpertLinear(nn.Module):
    """A linear layer of every expert: codes without gradients, and `bias` [E, out].

    `layer.to(device)` moves the codes; a change of dtype leaves them.
    """

    def __init__(self, weight: PackedExperts, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExpertLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        where = fn(torch.empty(0, device=self.weight.device)).device
        if where.type != "meta":
            self.weight = self.weight.to(where)
        return self

    def extra_repr(self) -> str:
        weight = self.weight
        return f"{weight.kind} [{weight.num_experts}, {weight.num_features}, {weight.width}]"


class QuantizedExperts(nn.Module):
    """What `Experts` computes, without gradients."""

    def __init__(
        self, gate_proj: QuantizedExpertLinear, up_proj: QuantizedExpertLinear, down_proj: QuantizedExpertLinear
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, *, activation: str, limit: float | None) -> Tensor:
        """As `Experts.forward`."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return quantized_moe_mlp(
            x,
            ids,
            weights,
            gate.weight,
            up.weight,
            down.weight,
            activation=activation,
            gate_bias=gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
            limit=limit,
        )


def install_experts(model: nn.Module, name: str, weights: dict[str, PackedExperts]) -> None:
    """Replace the `Experts` of that name. `weights`: of `gate_proj`, `up_proj` and `down_proj`."""
    old = model.get_submodule(name)
    assert isinstance(old, Experts), name
    layers = {}
    for part, weight in weights.items():
        of_part = old.get_submodule(part)
        assert isinstance(of_part.weight, Tensor)
        assert (weight.num_experts, weight.num_features, weight.width) == tuple(of_part.weight.shape), (name, part)
        bias = of_part.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        layers[part] = QuantizedExpertLinear(weight, bias)
    model.set_submodule(name, QuantizedExperts(**layers))
