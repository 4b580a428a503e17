"""Pieces of Triton code that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.hardware import INTERPRETING

INTERPRETED = tl.constexpr(INTERPRETING)


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 accumulation; fp32 operands are multiplied exactly (no TF32).

    The interpreter cannot multiply bf16, so there the operands are converted first.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, like):
    """fp32 `x` in the dtype of `like`, for an operand of `dot`; unchanged for bf16 in the interpreter."""
    if INTERPRETED and like.dtype == tl.bfloat16:
        return x
    return x.to(like.dtype)
