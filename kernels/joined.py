"""Several linear layers on one input as one matrix product, and a linear layer that casts its weight where it is used.

Parameters may be kept in fp32 while activations run in bf16. In training the weights of layers on the same input are
joined into one matrix, in the copy that the cast makes anyway: one product forward and two backward instead of three
and six (for q, k and v), and no sum of input gradients.

Shapes: N rows (any leading dimensions), C inputs, E outputs of all layers side by side. A weight is [outputs, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_NC: Tensor, weight_EC: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x weight^T + bias in the dtype of x; weight and bias of any float dtype."""
    return F.linear(x_NC, weight_EC.to(x_NC.dtype), None if bias_E is None else bias_E.to(x_NC.dtype))


def joined_linear(x_NC: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The outputs of several linear layers side by side in the last dimension, in the dtype of x; for training.

    Raises ValueError if some layers have a bias and some have none.
    """
    present = [bias for bias in biases if bias is not None]
    if len(present) not in (0, len(weights)) or len(biases) != len(weights):
        raise ValueError(f"{len(weights)} layers are joined but {len(present)} have a bias; give all or none")
    weight: Tensor = _JoinCast.apply(x_NC.dtype, *weights)  # type: ignore[no-untyped-call]
    bias: Tensor | None = _JoinCast.apply(x_NC.dtype, *present) if present else None  # type: ignore[no-untyped-call]
    return F.linear(x_NC, weight, bias)


class _JoinCast(torch.autograd.Function):
    """Concatenate along rows and cast, in one pass; the gradient is cut and cast back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.layout = [(part.shape[0], part.dtype) for part in parts]
        rows = sum(part.shape[0] for part in parts)
        joined = torch.empty(rows, *parts[0].shape[1:], dtype=dtype, device=parts[0].device)
        for target, part in zip(torch.split(joined, [part.shape[0] for part in parts]), parts, strict=True):
            target.copy_(part)
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cuts = torch.split(grads[0], [rows for rows, _ in ctx.layout])
        return (None, *(cut.to(dtype) for cut, (_, dtype) in zip(cuts, ctx.layout, strict=True)))
