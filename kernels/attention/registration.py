"""The attention kernels as `torch.library` operations: shapes without a device, and gradients.

The last arguments of both operations are the fields of `Options`, in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.kernels.attention.backward import launch_backward
from trine.kernels.attention.forward import launch_forward
from trine.kernels.attention.options import Options
from trine.kernels.operation import run


@torch.library.custom_op("trine::attention_forward", mutates_args=())
def attention_forward(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    low_BT: Tensor | None,
    high_BT: Tensor | None,
    first_BS: Tensor | None,
    last_BS: Tensor | None,
    position_BT: Tensor | None,
    sinks_H: Tensor | None,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    lower: bool,
    ordered: bool,
    scale: float,
    softcap: float,
    drop: float,
) -> tuple[Tensor, Tensor]:
    """The registered operation: o_BHTD (laid out as [B, T, H, D]) and lse_BHT."""
    tensors = (low_BT, high_BT, first_BS, last_BS, position_BT, sinks_H, slopes_H, bias_HR, seed)
    options = Options(*tensors, causal, lower, ordered, scale, softcap, drop)
    return launch_forward(q_BHTD, k_BKSD, v_BKSD, options)


@attention_forward.register_fake
def _(q_BHTD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, H, T, D = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, D).transpose(1, 2), q_BHTD.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("trine::attention_backward", mutates_args=())
def attention_backward(
    do_BHTD: Tensor,
    o_BHTD: Tensor,
    lse_BHT: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    low_BT: Tensor | None,
    high_BT: Tensor | None,
    first_BS: Tensor | None,
    last_BS: Tensor | None,
    position_BT: Tensor | None,
    sinks_H: Tensor | None,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    lower: bool,
    ordered: bool,
    scale: float,
    softcap: float,
    drop: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered operation: dq, dk, dv, dbias_HR (empty without a table) and rowsum(dO * O) as fp32 [B, H, T]."""
    tensors = (low_BT, high_BT, first_BS, last_BS, position_BT, sinks_H, slopes_H, bias_HR, seed)
    options = Options(*tensors, causal, lower, ordered, scale, softcap, drop)
    return launch_backward(q_BHTD, k_BKSD, v_BKSD, o_BHTD, lse_BHT, do_BHTD, options)


@attention_backward.register_fake
def _(
    do_BHTD: Tensor, o_BHTD: Tensor, lse_BHT: Tensor, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias_HR = rest[7]
    dq_BHTD, dk_BKSD, dv_BKSD = (
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q_BHTD, k_BKSD, v_BKSD)
    )
    dbias = q_BHTD.new_empty(0 if bias_HR is None else bias_HR.shape, dtype=torch.float32)
    return dq_BHTD, dk_BKSD, dv_BKSD, dbias, torch.empty_like(lse_BHT)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.numbers = inputs[12:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do_BHTD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, o_BHTD, lse_BHT = ctx.saved_tensors
    dq, dk, dv, dbias_HR, delta_BHT = run(attention_backward, do_BHTD, o_BHTD, lse_BHT, *inputs, *ctx.numbers)
    sinks_H, bias_HR = inputs[8], inputs[10]
    dsinks_H = None
    if sinks_H is not None:
        # A sink of -inf is none.
        weight_BHT = torch.exp(sinks_H.float()[:, None] - lse_BHT.masked_fill(lse_BHT == float("-inf"), 0.0))
        dsinks_H = -(weight_BHT * delta_BHT).sum(dim=(0, 2)).to(sinks_H.dtype)
    dbias = None if bias_HR is None else dbias_HR.to(bias_HR.dtype)
    return dq, dk, dv, None, None, None, None, None, dsinks_H, None, dbias, None, *(None for _ in ctx.numbers)


attention_forward.register_autograd(_backward, setup_context=_setup_context)
