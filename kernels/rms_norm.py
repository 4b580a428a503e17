"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Computed in fp32 whatever the dtype of x; the result has the dtype of x. The backward recomputes the normalised input
from x and one saved number per row, so that no fp32 copy of the activation is kept.

    r = 1 / sqrt(mean(x^2) + eps)      g = dy * weight
    dx = r * g - x * r^3 * mean(g * x)      dweight = sum over rows of dy * x * r

Shapes: N rows (any leading dimensions), C width. Bytes: reads x, writes y (forward); reads x, dy, writes dx (backward).
Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.to(work)
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight_C.to(work)).to(x_NC.dtype)


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; x of any float dtype, weight of any float dtype; returns the dtype of x."""
    if torch.is_grad_enabled() and (x_NC.requires_grad or weight_C.requires_grad):
        result: Tensor = _RMSNorm.apply(x_NC, weight_C, eps)  # type: ignore[no-untyped-call]
        return result
    return rms_norm_reference(x_NC, weight_C, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        work = torch.promote_types(x_NC.dtype, torch.float32)
        x = x_NC.to(work)
        rstd_N1 = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x_NC, weight_C, rstd_N1)
        return (x * rstd_N1 * weight_C.to(work)).to(x_NC.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy_NC,) = grads
        x_NC, weight_C, rstd_N1 = ctx.saved_tensors
        work = rstd_N1.dtype
        normed = x_NC.to(work) * rstd_N1
        dy = dy_NC.to(work)
        dweight_C = (dy * normed).flatten(0, -2).sum(dim=0).to(weight_C.dtype)
        g = dy * weight_C.to(work)
        mean_N1 = (g * normed).mean(dim=-1, keepdim=True)
        dx = torch.addcmul(g, normed, mean_N1, value=-1).mul_(rstd_N1)
        return dx.to(x_NC.dtype), dweight_C, None
