"""Rotary position embedding (RoPE), half-split layout.

Channel i of a head is paired with channel i + D/2 and the pair is turned by the angle position * inv_freq_i:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

A rotation is undone by the opposite angle, so the backward is the same function with -sin and saves no activation.
`rope_heads` does it on the way from a joined q, k, v product to the layout of attention, in the same pass.
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


def rope_heads(
    qkv_BTE: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a joined product, E = (H + 2 K) D, into q_BHTD, k_BKTD, v_BKTD (contiguous), q and k rotated."""
    result: tuple[Tensor, Tensor, Tensor] = _RopeHeads.apply(  # type: ignore[no-untyped-call]
        qkv_BTE, cos_BTR, sin_BTR, num_heads, num_kv_heads
    )
    return result


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float) -> Tensor:
    y_BTHD = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    _rotate_into(y_BTHD, x_BTHD, cos_BTR, sin_BTR, sign=sign)
    return y_BTHD


def _rotate_into(y_BTHD: Tensor, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float) -> None:
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    y1, y2 = y_BTHD.chunk(2, dim=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)


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


class _RopeHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BTE: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, ...]:
        B, T, E = qkv_BTE.shape
        counts = [num_heads, num_kv_heads, num_kv_heads]
        D = E // sum(counts)
        parts_BTHD = torch.split(qkv_BTE.view(B, T, -1, D), counts, dim=2)
        q_BHTD, k_BKTD, v_BKTD = (qkv_BTE.new_empty(B, count, T, D) for count in counts)
        for y_BHTD, x_BTHD in zip((q_BHTD, k_BKTD), parts_BTHD[:2], strict=True):
            _rotate_into(y_BHTD.transpose(1, 2), x_BTHD, cos_BTR, sin_BTR, sign=1.0)
        v_BKTD.transpose(1, 2).copy_(parts_BTHD[2])
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.counts = counts
        return q_BHTD, k_BKTD, v_BKTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos_BTR, sin_BTR = ctx.saved_tensors
        B, _, T, D = grads[0].shape
        dqkv_BTHD = grads[0].new_empty(B, T, sum(ctx.counts), D)
        parts_BTHD = torch.split(dqkv_BTHD, ctx.counts, dim=2)
        for dx_BTHD, dy_BHTD in zip(parts_BTHD[:2], grads[:2], strict=True):
            _rotate_into(dx_BTHD, dy_BHTD.transpose(1, 2), cos_BTR, sin_BTR, sign=-1.0)
        parts_BTHD[2].copy_(grads[2].transpose(1, 2))
        return dqkv_BTHD.view(B, T, -1), None, None, None, None
