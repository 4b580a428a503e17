"""From packed codes of every kind to numbers in plain Triton, exactly; float codes beside the integers of `quantized`.

The bits of an e4m3 or e2m1 code, moved to where a 16-bit number has sign, exponent and fraction, are its number over a
power of two, subnormal codes included, for both have an exponent that is 2^k - 1 too small:

              fp16                                           bf16
    e4m3      sign << 8, the seven bits << 7, times 2^8      sign << 8, << 4, times 2^120
    e2m1      sign << 12, the three bits << 9, times 2^14    sign << 12, << 6, times 2^126

Two codes for each 32-bit operation, one product for each pair; no conversion that only newer GPUs have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.language import INTERPRETED
from trine.kernels.quantized.decode import _halves as halves
from trine.kernels.quantized.decode import decode_slice


@triton.jit
def _as_number(bits, BRAIN: tl.constexpr):
    """Bit patterns as fp16 or bf16; in the interpreter, whose bf16 has no subnormal numbers, fp32 of the same value."""
    if INTERPRETED and BRAIN:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.bfloat16 if BRAIN else tl.float16, bitcast=True)
    return number


@triton.jit
def decode_codes(
    words,
    zero,
    SLICE: tl.constexpr,
    ZEROS: tl.constexpr,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    BRAIN: tl.constexpr,
    NVIDIA: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Slice number SLICE of a block without its scale, [ROWS, 32] in bf16 (the interpreter: fp32) if BRAIN, else fp16.

    FLOAT: the codes are e4m3 (8 bits) or e2m1 (4 bits); else integers, with `zero` where ZEROS.
    """
    if FLOAT:
        words = words >> (BITS * SLICE)
        if BITS == 8:
            sign = (words & 0x00800080) << 8
            number = words & 0x007F007F
            if BRAIN:
                value = _as_number(halves(sign | (number << 4), ROWS), BRAIN) * 1.329227995784916e36  # 2^120
            else:
                value = _as_number(halves(sign | (number << 7), ROWS), BRAIN) * 256.0
        else:
            sign = (words & 0x00080008) << 12
            number = words & 0x00070007
            if BRAIN:
                value = _as_number(halves(sign | (number << 6), ROWS), BRAIN) * 8.507059173023462e37  # 2^126
            else:
                value = _as_number(halves(sign | (number << 9), ROWS), BRAIN) * 16384.0
    else:
        value = decode_slice(words, zero, SLICE, ZEROS, BITS, BRAIN, NVIDIA, ROWS)
    return value


@triton.jit
def scale_of(value):
    """A scale as loaded, in fp32; bytes are exponents (e8m0), of which 0 is 2^-127, a subnormal number."""
    if value.dtype == tl.uint8:
        bits = value.to(tl.int32) << 23
        value = tl.where(bits == 0, 0x00400000, bits).to(tl.float32, bitcast=True)
    return value.to(tl.float32)
