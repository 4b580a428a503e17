"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Computed in fp32 whatever the dtype of x; the result has the dtype of x. The backward recomputes the normalised input
from x and one saved number per row, so that no fp32 copy of the activation is kept.

    r = 1 / sqrt(mean(x^2) + eps)      g = dy * weight
    n = x * r      dx = r * (g - n * mean(g * n))      dweight = sum over rows of dy * n

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
    return _normalise(x_NC.reshape(-1, x_NC.shape[-1]), weight_C, eps)[0].view(x_NC.shape)


# Numbers worked on at a time on a CPU, which bounds each fp32 intermediate result to 4 MiB. Pieces that fit a smaller
# cache were measured no faster, and make threads wait for each other more often.
_CHUNK_NUMBERS = 2**20


def _chunk_rows(x_NC: Tensor) -> int:
    return max(1, _CHUNK_NUMBERS // x_NC.shape[-1] if x_NC.device.type == "cpu" else len(x_NC))


def _normalise(x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, contiguous, and 1 / sqrt(mean(x^2) + eps) of each row."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    y_NC = torch.empty(x_NC.shape, dtype=x_NC.dtype, device=x_NC.device)
    rstd_N1 = torch.empty(len(x_NC), 1, dtype=work, device=x_NC.device)
    weight = weight_C.to(work)
    rows = _chunk_rows(x_NC)
    for x_nC, y_nC, rstd_n1 in zip(*(torch.split(t, rows) for t in (x_NC, y_NC, rstd_N1)), strict=True):
        normed_nC = x_nC.to(work, copy=True)
        mean_n1 = torch.linalg.vector_norm(normed_nC, dim=-1, keepdim=True).square_().div_(x_NC.shape[-1])
        torch.rsqrt(mean_n1.add_(eps), out=rstd_n1)
        y_nC.copy_(normed_nC.mul_(rstd_n1).mul_(weight))
    return y_NC, rstd_N1


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        x_NC = x.reshape(-1, x.shape[-1])
        y_NC, rstd_N1 = _normalise(x_NC, weight_C, eps)
        ctx.save_for_backward(x_NC, weight_C, rstd_N1)
        return y_NC.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NC, weight_C, rstd_N1 = ctx.saved_tensors
        work = rstd_N1.dtype
        dy_NC = grads[0].reshape(x_NC.shape)
        dx_NC = torch.empty(x_NC.shape, dtype=x_NC.dtype, device=x_NC.device)
        dweight_C = torch.zeros_like(weight_C, dtype=work)
        weight = weight_C.to(work)
        rows = _chunk_rows(x_NC)
        parts = (torch.split(tensor, rows) for tensor in (x_NC, dy_NC, dx_NC, rstd_N1))
        for x_nC, dy_nC, dx_nC, rstd_n1 in zip(*parts, strict=True):
            normed_nC = x_nC.to(work, copy=True).mul_(rstd_n1)
            g_nC = dy_nC.to(work, copy=True)
            products_nC = normed_nC * g_nC
            dweight_C += products_nC.sum(dim=0)
            mean_n1 = torch.mv(products_nC, weight).div_(x_NC.shape[-1])[:, None]
            dx_nC.copy_(g_nC.mul_(weight).addcmul_(normed_nC, mean_n1, value=-1).mul_(rstd_n1))
        return dx_NC.view(grads[0].shape), dweight_C.to(weight_C.dtype), None
