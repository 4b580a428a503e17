"""Rotary position embedding (RoPE), half-split layout.

Channel i of a head is paired with channel i + D/2 and the pair is turned by the angle position * inv_freq_i:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

A rotation is undone by the opposite angle, so the backward is the same function with -sin and saves no activation.
cos and sin are computed in fp32 and rounded to the dtype of x, as transformers does.

Shapes: B batch, T tokens, H heads, D head dimension. Source: Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_tables(positions_BT: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cos and sin of position * inv_freq, each [B, T, D/2] in `dtype` (the angles are fp32)."""
    angles = positions_BT[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_reference(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """The formula; cos and sin of shape [B or 1, T, R] with R = D/2."""
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rope(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate every head of x by its token's angles; x, cos and sin share one dtype. Returns a new contiguous tensor."""
    if x_BTHD.dtype != cos_BTR.dtype or x_BTHD.dtype != sin_BTR.dtype:
        raise ValueError(f"x is {x_BTHD.dtype} but cos and sin are {cos_BTR.dtype}, {sin_BTR.dtype}; make them equal")
    result: Tensor = _Rope.apply(x_BTHD, cos_BTR, sin_BTR)  # type: ignore[no-untyped-call]
    return result


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float) -> Tensor:
    y_BTHD = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    y1, y2 = y_BTHD.chunk(2, dim=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return y_BTHD


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTR, sin_BTR)
        return _rotate(x_BTHD, cos_BTR, sin_BTR, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dy_BTHD,) = grads
        cos_BTR, sin_BTR = ctx.saved_tensors
        return _rotate(dy_BTHD, cos_BTR, sin_BTR, sign=-1.0), None, None
