"""The gated unit of a feed-forward layer: y = activation(gate) * up  (SwiGLU with silu, GeGLU with gelu).

In training gate and up come as one tensor from one matrix product, and their gradients go back as one.

    dup = dy * act(gate)      dgate = dy * up * act'(gate)

Shapes: N tokens (any leading dimensions), F feed-forward width. Source: Shazeer 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> (activation, its backward written into the last argument: dy, input, dinput).
# "gelu_tanh" is the tanh approximation (GPT-2's gelu_new), "gelu" the exact one.
_aten = torch.ops.aten
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], object]]] = {
    "silu": (F.silu, lambda dy, x, dx: _aten.silu_backward(dy, x, grad_input=dx)),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x, dx: _aten.gelu_backward(dy, x, approximate="tanh", grad_input=dx),
    ),
    "gelu": (F.gelu, lambda dy, x, dx: _aten.gelu_backward(dy, x, grad_input=dx)),
    "relu": (F.relu, lambda dy, x, dx: _aten.threshold_backward(dy, x, 0, grad_input=dx)),
    "relu2": (lambda x: F.relu(x).square(), lambda dy, x, dx: torch.mul(dy, 2 * F.relu(x), out=dx)),
}
ACTIVATIONS: tuple[str, ...] = tuple(_ACTIVATIONS)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name, elementwise; for feed-forward layers without a gate."""
    return _ACTIVATIONS[activation][0](x)


def gated_reference(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(gate_NF.dtype, torch.float32)
    return (activate(gate_NF.to(work), activation) * up_NF.to(work)).to(gate_NF.dtype)


def gated(gate_NF: Tensor, up_NF: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; both of one dtype and shape. `activation` is one of `ACTIVATIONS`."""
    if gate_NF.dtype != up_NF.dtype:
        raise ValueError(f"gate is {gate_NF.dtype} but up is {up_NF.dtype}; cast them to one")
    return activate(gate_NF, activation) * up_NF


def gated_clamped(gate_NF: Tensor, up_NF: Tensor, limit: float) -> Tensor:
    """gpt-oss's unit: g * sigmoid(1.702 g) * (u + 1), g = min(gate, limit), u = up clamped to [-limit, limit]."""
    gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit)
    return gate_NF * torch.sigmoid(1.702 * gate_NF) * (up_NF + 1)


def gated_joined(gate_up_NG: Tensor, activation: str) -> Tensor:
    """As `gated` for training: gate and up are the halves of the last dimension, as one matrix product leaves them."""
    result: Tensor = _Gated.apply(gate_up_NG, activation)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_NG: Tensor, activation: str) -> Tensor:
        gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
        activated_NF = _ACTIVATIONS[activation][0](gate_NF)
        ctx.save_for_backward(gate_up_NG, activated_NF)
        ctx.activation = activation
        return activated_NF * up_NF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy_NF,) = grads
        gate_up_NG, activated_NF = ctx.saved_tensors
        gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
        dgate_up_NG = torch.empty_like(gate_up_NG)
        dgate_NF, dup_NF = dgate_up_NG.chunk(2, dim=-1)
        torch.mul(dy_NF, activated_NF, out=dup_NF)
        _ACTIVATIONS[ctx.activation][1](dy_NF * up_NF, gate_NF, dgate_NF)
        return dgate_up_NG, None
