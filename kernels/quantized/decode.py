"""From packed words to numbers: shifts, masks and one subtraction in plain Triton, no conversion from integers. On
NVIDIA a mask and its pattern are one instruction, written in assembly; the plain form beside it gives the same bits.

A 16-bit pattern with the exponent of 2^10 (fp16) or 2^7 (bf16) and an unsigned code in its lowest bits is the number
2^10 + code or 2^7 + code, exactly. Flipping a code's sign bit turns two's complement into code + 2^(bits - 1), in the
same instruction:

    4 bits           (q & 0xF) ^ 0x6408        = 1032 + q  (fp16)      (q & 0xF) ^ 0x4308 = 136 + q  (bf16)
    8 bits, fp16     (q & 0xFF) ^ 0x6480       = 1152 + q
    8 bits, bf16     (q & 0x7F) ^ 0x4300       = 128 + q, or 256 + q for q < 0, where bf16 counts in steps of one up
                     to 256: minus (q & 0x80) ^ 0x4300, which is 128 or 256

Zero points are subtracted in the same step. Every value q - z is a small integer, so nothing here is rounded. One
32-bit operation works on two codes; see `packing.py` for where they lie.

`dequantize` writes the whole weight: (q - z) s in fp32, then rounded to the dtype asked for.
Bytes: N K (bits / 8 + itemsize) and the scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import INTERPRETED
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.quantized.cpu import dequantize_rows
from trine.kernels.quantized.packing import PackedWeight
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def _halves(words, ROWS: tl.constexpr):
    """The two 16-bit halves of words [ROWS, 16] as neighbours [ROWS, 32], low half first."""
    low = words.to(tl.int16)
    high = (words >> 16).to(tl.int16)
    return tl.reshape(tl.join(low, high), [ROWS, 32])


@triton.constexpr_function
def _lop3(mask, pattern):  # type: ignore[no-untyped-def]
    """(a & mask) ^ pattern as one instruction of NVIDIA's; 0x6A is the table of this function of three bits."""
    return f"lop3.b32 $0, $1, {mask:#010x}, {pattern:#010x}, 0x6A;"


@triton.jit
def _pattern(words, MASK: tl.constexpr, PATTERN: tl.constexpr, NVIDIA: tl.constexpr):
    """(words & MASK) ^ PATTERN. Written plainly, ptxas makes two instructions of it, for it takes one constant each."""
    if NVIDIA:
        bits = tl.inline_asm_elementwise(_lop3(MASK, PATTERN), "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bits = (words & MASK) ^ PATTERN
    return bits


@triton.jit
def _as_number(bits, BRAIN: tl.constexpr):
    """Bit patterns as fp16 or bf16. The interpreter has no arithmetic on bf16: there fp32, which holds the same."""
    number = bits.to(tl.bfloat16 if BRAIN else tl.float16, bitcast=True)
    if INTERPRETED and BRAIN:
        number = number.to(tl.float32)
    return number


@triton.jit
def decode_slice(
    words,
    zero,
    SLICE: tl.constexpr,
    ZEROS: tl.constexpr,
    BITS: tl.constexpr,
    BRAIN: tl.constexpr,
    NVIDIA: tl.constexpr,
    ROWS: tl.constexpr,
):
    """q - z of slice number SLICE of a block, [ROWS, 32], exact in bf16 (the interpreter: fp32) if BRAIN, else fp16.

    `words` int32 [ROWS, 16]; `zero` fp32 [ROWS], which counts only where ZEROS.
    """
    words = words >> (BITS * SLICE)
    if BITS == 8 and BRAIN:
        value = _as_number(_halves(_pattern(words, 0x007F007F, 0x43004300, NVIDIA), ROWS), BRAIN)
        value -= _as_number(_halves(_pattern(words, 0x00800080, 0x43004300, NVIDIA), ROWS), BRAIN)
        if ZEROS:
            value -= zero.to(value.dtype)[:, None]
    else:
        if BITS == 8:
            value = _as_number(_halves(_pattern(words, 0x00FF00FF, 0x64806480, NVIDIA), ROWS), BRAIN)
            offset = 1152.0
        elif not BRAIN:
            value = _as_number(_halves(_pattern(words, 0x000F000F, 0x64086408, NVIDIA), ROWS), BRAIN)
            offset = 1032.0
        else:
            value = _as_number(_halves(_pattern(words, 0x000F000F, 0x43084308, NVIDIA), ROWS), BRAIN)
            offset = 136.0
        if ZEROS:
            value -= (zero + offset).to(value.dtype)[:, None]
        else:
            value = (value - offset).to(value.dtype)
    return value


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    w_ptr,
    num_features,
    width,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NVIDIA: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One block of FEATURES rows. GROUP is 0 where a row has one scale."""
    feature = tl.program_id(0) * FEATURES
    block = tl.program_id(1)
    features = tl.minimum(feature + tl.arange(0, FEATURES), num_features - 1)
    inside = feature + tl.arange(0, FEATURES) < num_features
    rows = features.to(tl.int64)
    words = tl.load(
        words_ptr + (block * tl.cast(num_features, tl.int64) + rows)[:, None] * 16 + tl.arange(0, 16)[None, :]
    )
    for s in tl.static_range(16 // BITS):
        first = block * (512 // BITS) + 32 * s
        # Past the end of a row there is no group, and nothing is written.
        group = 0
        if GROUP:
            group = tl.minimum(first, width - 1) // GROUP
        zero = 0.0
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + group * num_features + features).to(tl.float32)
        scale = tl.load(scales_ptr + group * num_features + features).to(tl.float32)
        w = decode_slice(words, zero, s, zeros_ptr is not None, BITS, False, NVIDIA, FEATURES).to(tl.float32)
        w *= scale[:, None]
        columns = first + tl.arange(0, 32)
        places = rows[:, None] * width + columns[None, :]
        tl.store(w_ptr + places, w.to(w_ptr.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return Config({"FEATURES": 16 if target.interpreted else 64}, num_warps=4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [Config({"FEATURES": rows}, warps, 1) for rows in (16, 32, 64, 128) for warps in (4, 8)]


DEQUANTIZE = Tunable("dequantize", _rule, _candidates)


def group_constant(scales_GN: Tensor, width: int) -> int:
    """GROUP of the kernels: 0 where a row has one scale."""
    return 0 if scales_GN.shape[0] <= 1 else width // scales_GN.shape[0]


def launch_dequantize(
    words: Tensor, scales_GN: Tensor, zeros_GN: Tensor | None, bits: int, width: int, dtype: torch.dtype
) -> Tensor:
    """w_NK of the layout "tiles"."""
    blocks, num_features, _ = words.shape
    w_NK = words.new_empty(num_features, width, dtype=result_dtype(dtype))
    config = DEQUANTIZE.pick(dtype, target_of(words), N=num_features, K=width)
    arguments = {
        "words_ptr": words,
        "scales_ptr": scales_GN,
        "zeros_ptr": zeros_GN,
        "w_ptr": w_NK,
        "num_features": num_features,
        "width": width,
        "BITS": bits,
        "GROUP": group_constant(scales_GN, width),
        "NVIDIA": target_of(words).is_nvidia,
    }
    launch(dequantize_kernel, (ceil_div(num_features, config.blocks["FEATURES"]), blocks), config, arguments)
    return rounded(w_NK, dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """w_NK in `dtype` (float32, bfloat16 or float16): (q - z) s in fp32, rounded once to the dtype."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")
    if weight.layout == "tiles":
        return launch_dequantize(weight.words, weight.scales, weight.zeros, weight.bits, weight.width, dtype)
    return dequantize_rows(weight, dtype)
