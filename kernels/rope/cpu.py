"""RoPE on a CPU: torch operations that write straight into the result, and a backward that saves no activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pairs(x: Tensor, R: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channels of the pairs, as views."""
    if interleaved:
        return x[..., 0 : 2 * R : 2], x[..., 1 : 2 * R : 2]
    return x[..., :R], x[..., R : 2 * R]


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float, interleaved: bool = False) -> Tensor:
    y_BTHD = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    _rotate_into(y_BTHD, x_BTHD, cos_BTR, sin_BTR, sign=sign, interleaved=interleaved)
    return y_BTHD


def _rotate_into(
    y_BTHD: Tensor, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float, interleaved: bool = False
) -> None:
    R = cos_BTR.shape[-1]
    x1, x2 = pairs(x_BTHD, R, interleaved)
    y1, y2 = pairs(y_BTHD, R, interleaved)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    y_BTHD[..., 2 * R :].copy_(x_BTHD[..., 2 * R :])


class Rope(torch.autograd.Function):
    """One tensor of heads; arguments as of `op.rope`."""

    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos_BTR, sin_BTR)
        return _rotate(x_BTHD, cos_BTR, sin_BTR, sign=1.0, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (dy_BTHD,) = grads
        cos_BTR, sin_BTR = ctx.saved_tensors
        return _rotate(dy_BTHD, cos_BTR, sin_BTR, sign=-1.0, interleaved=ctx.interleaved), None, None, None


class RopeHeads(torch.autograd.Function):
    """Joined rows to q, k, v without norms; arguments as of `op.rope_heads`."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTE: Tensor,
        cos_BTR: Tensor,
        sin_BTR: Tensor,
        num_heads: int,
        num_kv_heads: int,
        interleaved: bool,
    ) -> tuple[Tensor, ...]:
        B, T, E = qkv_BTE.shape
        counts = [num_heads, num_kv_heads, num_kv_heads]
        D = E // sum(counts)
        parts_BTHD = torch.split(qkv_BTE.view(B, T, -1, D), counts, dim=2)
        q_BHTD, k_BKTD, v_BKTD = (qkv_BTE.new_empty(B, count, T, D) for count in counts)
        for y_BHTD, x_BTHD in zip((q_BHTD, k_BKTD), parts_BTHD[:2], strict=True):
            _rotate_into(y_BHTD.transpose(1, 2), x_BTHD, cos_BTR, sin_BTR, sign=1.0, interleaved=interleaved)
        v_BKTD.transpose(1, 2).copy_(parts_BTHD[2])
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.counts = counts
        ctx.interleaved = interleaved
        return q_BHTD, k_BKTD, v_BKTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        cos_BTR, sin_BTR = ctx.saved_tensors
        B, _, T, D = grads[0].shape
        dqkv_BTHD = grads[0].new_empty(B, T, sum(ctx.counts), D)
        parts_BTHD = torch.split(dqkv_BTHD, ctx.counts, dim=2)
        for dx_BTHD, dy_BHTD in zip(parts_BTHD[:2], grads[:2], strict=True):
            _rotate_into(dx_BTHD, dy_BHTD.transpose(1, 2), cos_BTR, sin_BTR, sign=-1.0, interleaved=ctx.interleaved)
        parts_BTHD[2].copy_(grads[2].transpose(1, 2))
        return dqkv_BTHD.view(B, T, -1), None, None, None, None, None
