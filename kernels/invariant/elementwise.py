"""What lies between the products: the unit of a feed-forward layer, and log-probabilities, with bits of a row's own.

    h = act(gate) * up  or  act(up)             log p = x - max - log sum exp(x - max)

torch's elementwise operations on a CPU take numbers in vectors and what is left over one by one, and where an
operation is more than one rounded step (silu, sigmoid, gelu in its tanh form) the two ways differ in the last bit: how
many rows there are decides which numbers are left over. So the units are composed here of single steps, in fp32: sums,
products and quotients, which are exact to the last bit everywhere, and exp, tanh and erf, of which each has one way.
The result is rounded once. Only gate and up are kept for the backward, which computes the rest again.

log_softmax on a GPU reads a row in pieces from where it begins in memory, and rows of an odd vocabulary begin anywhere:
they are padded to a multiple of 32 numbers first.

Shapes: N rows (any leading dimensions), F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.invariant.op import invariant_matmul
from trine.kernels.mlp.op import CLAMPED, GATED_ACTIVATIONS

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (torch.exp(-x) + 1.0),
    "gelu": lambda x: (torch.erf(x * math.sqrt(0.5)) + 1.0) * x * 0.5,
    "gelu_tanh": lambda x: (torch.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)) + 1.0) * x * 0.5,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) * F.relu(x),
}


def invariant_unit(gate_NF: Tensor | None, up_NF: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """act(gate) * up in the dtype of up, or act(up) without a gate; with gradients.

    `activation` and `limit` as of `gated_mlp`. Raises ValueError for an activation that is not known, a limit missing
    or not wanted, and for gate and up that differ in dtype or shape.
    """
    if activation not in GATED_ACTIVATIONS or (gate_NF is None and activation == CLAMPED):
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(GATED_ACTIVATIONS)}")
    if (limit is not None) != (activation == CLAMPED):
        raise ValueError(f"limit is {limit} with activation {activation!r}; {CLAMPED} needs one and no other takes one")
    if gate_NF is not None and (gate_NF.dtype != up_NF.dtype or gate_NF.shape != up_NF.shape):
        raise ValueError(
            f"gate is {gate_NF.dtype} {tuple(gate_NF.shape)} but up is {up_NF.dtype} {tuple(up_NF.shape)}; they must "
            "agree"
        )
    h_NF: Tensor = _Unit.apply(gate_NF, up_NF, activation, limit)  # type: ignore[no-untyped-call]
    return h_NF


def _unit(gate: Tensor | None, up: Tensor, activation: str, limit: float | None) -> Tensor:
    dtype, work = up.dtype, torch.promote_types(up.dtype, torch.float32)
    up = up.to(work)
    if gate is None:
        return _ACTIVATIONS[activation](up).to(dtype)
    gate = gate.to(work)
    if limit is None:
        return (_ACTIVATIONS[activation](gate) * up).to(dtype)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate / (torch.exp(gate * -1.702) + 1.0) * (up + 1.0)).to(dtype)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor | None, up_NF: Tensor, activation: str, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.arguments = activation, limit
        return _unit(gate_NF, up_NF, activation, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF = ctx.saved_tensors
        gate_NF, up_NF = None if gate_NF is None else gate_NF.detach().requires_grad_(), up_NF.detach().requires_grad_()
        leaves = [x for x in (gate_NF, up_NF) if x is not None]
        with torch.enable_grad():
            found = torch.autograd.grad(_unit(gate_NF, up_NF, *ctx.arguments), leaves, grads[0])
        return (None if gate_NF is None else found[0]), found[-1], None, None


def invariant_mlp(
    x_NC: Tensor,
    gate_weight_FC: Tensor | None,
    up_weight_FC: Tensor,
    down_weight_CF: Tensor,
    *,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """A feed-forward layer, gated or (`gate_weight_FC` None) not, as `gated_mlp` and `mlp`; with gradients.

    Raises ValueError as `invariant_matmul` and `invariant_unit` do.
    """
    gate_NF = None if gate_weight_FC is None else invariant_matmul(x_NC, gate_weight_FC, gate_bias)
    up_NF = invariant_matmul(x_NC, up_weight_FC, up_bias)
    return invariant_matmul(invariant_unit(gate_NF, up_NF, activation, limit), down_weight_CF, down_bias)


def invariant_log_probs(logits_NV: Tensor) -> Tensor:
    """Log-probabilities of every token, fp32 [..., V] (fp64 for fp64 logits)."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    V = logits_NV.shape[-1]
    # Padded always: it is a copy, which begins at a multiple of 16 bytes, and so does every row.
    return F.log_softmax(F.pad(logits_NV, (0, 32 - V % 32), value=float("-inf")), dim=-1)[..., :V]
