"""The Triton kernel of distillation: one program per row of the logits of student and teacher.

One pass over both keeps, in each lane, a maximum and a sum of exponentials for each model, and for the teacher the sum
of exp(t - max) (t - s) beside it. A second pass writes the gradient over the student's logits.

    s, t = capped logits / T        KL = sum_v p_t (t - s) - lse_t + lse_s
    dstudent = T (p_s - p_t) (1 - (capped / softcap)^2)        of T^2 KL

Bytes for V numbers of b bytes of either: 2 V b read for the statistics, 2 V b read (at most) and V b written for the
gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.cross_entropy.rows import LOWEST, log_sum_exp, observe, row_candidates, row_config, tanh
from trine.kernels.launch import launch
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def _compare(x, y, top, total, teacher_top, teacher_total, gap):
    """Take scaled logits x of the student and y of the teacher into the running statistics."""
    top, total = observe(x, top, total)
    below = tl.exp(-tl.abs(y - teacher_top))
    larger = y > teacher_top
    share = tl.where(larger, 1.0, below)
    # What the teacher gives no share must not count, though it be -inf for one or both.
    added = share * (tl.where(share > 0.0, y, 0.0) - tl.where(share > 0.0, x, 0.0))
    gap = tl.where(larger, gap * below, gap) + added
    teacher_total = tl.where(larger, teacher_total * below, teacher_total) + share
    return top, total, tl.maximum(teacher_top, y), teacher_total, gap


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return tanh(x / softcap) * softcap
    return x


@triton.jit
def _gradient(
    x, y, lse, teacher_lse, temperature, softcap, teacher_softcap, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr
):
    """The student's gradient of a block of a row."""
    x = _capped(x, softcap, CAPPED)
    y = _capped(y, teacher_softcap, TEACHER_CAPPED)
    gradient = temperature * (tl.exp(x / temperature - lse) - tl.exp(y / temperature - teacher_lse))
    if CAPPED:
        gradient *= 1.0 - (x / softcap) * (x / softcap)
    return gradient


@triton.jit
def distillation_rows_kernel(
    logits_ptr,
    teacher_ptr,
    dlogits_ptr,
    valid_ptr,
    losses_ptr,
    vocab_size,
    logits_stride,
    teacher_stride,
    temperature,
    softcap,
    teacher_softcap,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: its loss, and its gradient (of the stride of the logits) where wanted; 0 where it is not valid."""
    row = tl.program_id(0)
    valid = True
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + row).to(tl.int32) != 0
    logits_ptr += row.to(tl.int64) * logits_stride
    teacher_ptr += row.to(tl.int64) * teacher_stride
    if dlogits_ptr is not None:
        dlogits_ptr += row.to(tl.int64) * logits_stride
    lanes = tl.arange(0, BLOCK_V)
    # Whole blocks need no mask, which would keep rows of odd length from being read in wide loads.
    whole = vocab_size // BLOCK_V * BLOCK_V
    if valid:
        top = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
        total = tl.zeros([BLOCK_V], dtype=tl.float32)
        teacher_top = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
        teacher_total = tl.zeros([BLOCK_V], dtype=tl.float32)
        gap = tl.zeros([BLOCK_V], dtype=tl.float32)
        for start in range(0, whole, BLOCK_V):
            x = tl.load(logits_ptr + start + lanes, eviction_policy="evict_last").to(tl.float32)
            y = tl.load(teacher_ptr + start + lanes, eviction_policy="evict_last").to(tl.float32)
            x = _capped(x, softcap, CAPPED) / temperature
            y = _capped(y, teacher_softcap, TEACHER_CAPPED) / temperature
            top, total, teacher_top, teacher_total, gap = _compare(x, y, top, total, teacher_top, teacher_total, gap)
        if whole < vocab_size:
            left = whole + lanes < vocab_size
            x = tl.load(logits_ptr + whole + lanes, mask=left, other=0.0).to(tl.float32)
            y = tl.load(teacher_ptr + whole + lanes, mask=left, other=0.0).to(tl.float32)
            x = tl.where(left, _capped(x, softcap, CAPPED) / temperature, float("-inf"))
            y = tl.where(left, _capped(y, teacher_softcap, TEACHER_CAPPED) / temperature, float("-inf"))
            top, total, teacher_top, teacher_total, gap = _compare(x, y, top, total, teacher_top, teacher_total, gap)
        lse = log_sum_exp(top, total)
        teacher_lse = log_sum_exp(teacher_top, teacher_total)
        difference = tl.sum(gap * tl.exp(teacher_top - teacher_lse), axis=0)
        tl.store(losses_ptr + row, temperature * temperature * (difference - teacher_lse + lse))
        if dlogits_ptr is not None:
            for start in range(0, whole, BLOCK_V):
                x = tl.load(logits_ptr + start + lanes, eviction_policy="evict_first").to(tl.float32)
                y = tl.load(teacher_ptr + start + lanes, eviction_policy="evict_first").to(tl.float32)
                gradient = _gradient(
                    x, y, lse, teacher_lse, temperature, softcap, teacher_softcap, CAPPED, TEACHER_CAPPED
                )
                tl.store(dlogits_ptr + start + lanes, gradient.to(dlogits_ptr.dtype.element_ty))
            if whole < vocab_size:
                left = whole + lanes < vocab_size
                x = tl.load(logits_ptr + whole + lanes, mask=left, other=0.0).to(tl.float32)
                y = tl.load(teacher_ptr + whole + lanes, mask=left, other=0.0).to(tl.float32)
                gradient = _gradient(
                    x, y, lse, teacher_lse, temperature, softcap, teacher_softcap, CAPPED, TEACHER_CAPPED
                )
                tl.store(dlogits_ptr + whole + lanes, gradient.to(dlogits_ptr.dtype.element_ty), mask=left)
    else:
        tl.store(losses_ptr + row, 0.0)
        if dlogits_ptr is not None:
            zeros = tl.zeros([BLOCK_V], dtype=dlogits_ptr.dtype.element_ty)
            for start in range(0, vocab_size, BLOCK_V):
                tl.store(dlogits_ptr + start + lanes, zeros, mask=start + lanes < vocab_size)


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    """Two rows and five statistics leave registers for eight numbers of each, fewer for odd rows."""
    if target.interpreted:
        return Config({"BLOCK_V": 32})
    return row_config(shape["V"], target, dtype.itemsize, 4 if shape["V"] % 16 else 8)


DISTILLATION_ROWS = Tunable("distillation_rows", _rule, row_candidates)


def launch_distillation(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    valid_N: Tensor | None,
    losses_N: Tensor,
    dlogits_NV: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
) -> None:
    """Fill losses (fp32 [N]) and dlogits, which may be the logits. Rows may be apart but not their numbers."""
    config = DISTILLATION_ROWS.pick(logits_NV.dtype, target_of(logits_NV), V=logits_NV.shape[1])
    arguments = {
        "logits_ptr": logits_NV,
        "teacher_ptr": teacher_NV,
        "dlogits_ptr": dlogits_NV,
        "valid_ptr": valid_N,
        "losses_ptr": losses_N,
        "vocab_size": logits_NV.shape[1],
        "logits_stride": logits_NV.stride(0),
        "teacher_stride": teacher_NV.stride(0),
        "temperature": temperature,
        "softcap": softcap or 0.0,
        "teacher_softcap": teacher_softcap or 0.0,
        "CAPPED": softcap is not None,
        "TEACHER_CAPPED": teacher_softcap is not None,
    }
    launch(distillation_rows_kernel, (logits_NV.shape[0],), config, arguments)
