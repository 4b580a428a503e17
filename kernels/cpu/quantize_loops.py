"""Rows of activations as int8 codes or float8 numbers with their scales, and sums times such scales. Imports Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import exact, parallel
from trine.kernels.cpu.numbers_loops import bits_of, from_bits, store, widen

# Of infinity, the first that is no finite number, and all bits but the sign.
_INFINITY, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
# Bits of fp32: the exponent of 2^-6, the least normal number of e4m3; 3 added to an exponent; twice what exponents are
# stored above, from which that of a power of two is taken for its reciprocal.
_LEAST_NORMAL, _THREE_BITS, _TWICE_THE_BIAS = np.uint32(121 << 23), np.uint32(3 << 23), np.uint32(254 << 23)


@exact
def scale_of(x_K: Any, limit: float, smallest: float) -> Any:
    """max |x| / limit, at least `smallest`; NaN where x has NaN or infinity.

    The largest is found among the bits of numbers without their sign, which are in the same order.
    """
    largest = np.uint32(0)
    for k in range(x_K.shape[0]):
        bits = bits_of(widen(x_K[k])) & _MAGNITUDE
        largest = bits if bits > largest else largest
    if largest >= _INFINITY:
        return np.float32(np.nan)
    return max(from_bits(largest) / np.float32(limit), np.float32(smallest))


@exact
def quantize_row(x_K: Any, scale: float, limit: float, codes_K: Any) -> None:
    """q = round(x / s), ties to even; 0 where the scale is NaN."""
    if scale != scale:
        codes_K[:] = 0
        return
    for k in range(x_K.shape[0]):
        number = np.rint(widen(x_K[k]) / scale)
        codes_K[k] = np.int8(min(max(number, np.float32(-limit)), np.float32(limit)))


@exact
def row_of(x_K: Any) -> Any:
    """A row in fp32: loops over bf16 that do more than this are not vectorized."""
    row_K = np.empty(x_K.shape[0], np.float32)
    for k in range(x_K.shape[0]):
        row_K[k] = widen(x_K[k])
    return row_K


@parallel
def quantize_int8(x_MK: Any, limit: float, smallest: float, codes_MK: Any, scales_M: Any) -> None:
    """The codes and the scale of every row."""
    for m in prange(x_MK.shape[0]):
        row_K = row_of(x_MK[m])
        scales_M[m] = scale_of(row_K, limit, smallest)
        quantize_row(row_K, scales_M[m], limit, codes_MK[m])


@exact
def round_e4m3(x_K: Any, scale: float, limit: float, numbers_K: Any) -> None:
    """The float8 (e4m3) numbers next to x / s, ties to even, as bf16, which holds them exactly.

    Between two powers of two they are eight to a power, below 2^-6 multiples of 2^-9: a whole number of quanta.
    """
    for k in range(x_K.shape[0]):
        q = min(max(x_K[k] / scale, np.float32(-limit)), np.float32(limit))
        power = bits_of(q) & _INFINITY
        quantum = (power if power > _LEAST_NORMAL else _LEAST_NORMAL) - _THREE_BITS
        number = np.rint(q * from_bits(_TWICE_THE_BIAS - quantum)) * from_bits(quantum)
        numbers_K[k] = np.uint16(bits_of(number) >> np.uint32(16))


@parallel
def quantize_e4m3(x_MK: Any, block: int, limit: float, smallest: float, numbers_MK: Any, scales_MB: Any) -> None:
    """The numbers and the scale of every `block` numbers of a row."""
    K = x_MK.shape[1]
    for m in prange(x_MK.shape[0]):
        row_K = row_of(x_MK[m])
        for b in range(scales_MB.shape[1]):
            part = slice(b * block, min(K, (b + 1) * block))
            scales_MB[m, b] = scale_of(row_K[part], limit, smallest)
            round_e4m3(row_K[part], scales_MB[m, b], limit, numbers_MK[m, part])


@parallel
def scale_numbers(numbers_MK: Any, scales_MB: Any, block: int, scaled_MK: Any) -> None:
    """Numbers in bf16 times their scales, of which every `block` numbers have one, rounded to bf16."""
    K = numbers_MK.shape[1]
    for m in prange(numbers_MK.shape[0]):
        row_K = row_of(numbers_MK[m])
        for b in range(scales_MB.shape[1]):
            for k in range(b * block, min(K, (b + 1) * block)):
                row_K[k] *= scales_MB[m, b]
        for k in range(K):
            store(scaled_MK[m], k, row_K[k])


@parallel
def scale_sums(sums_MN: Any, x_scales_M: Any, scales_N: Any, bias_N: Any, y_MN: Any) -> None:
    """y = sums x_scales scales + bias, in fp32 and rounded to the numbers of y; the bias may be empty, y the sums."""
    for m in prange(sums_MN.shape[0]):
        row_N = row_of(sums_MN[m])
        for n in range(row_N.shape[0]):
            row_N[n] = row_N[n] * x_scales_M[m] * scales_N[n]
        for n in range(bias_N.shape[0]):
            row_N[n] += bias_N[n]
        for n in range(row_N.shape[0]):
            store(y_MN[m], n, row_N[n])
