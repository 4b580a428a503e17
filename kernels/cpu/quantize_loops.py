"""Rows of activations as int8 codes, each with its scale. Imports Numba (see `compiled.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import exact, parallel
from trine.kernels.cpu.numbers_loops import bits_of, from_bits, widen

# Of infinity, the first that is no finite number, and all bits but the sign.
_INFINITY, _MAGNITUDE = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)


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


@parallel
def quantize_int8(x_MK: Any, limit: float, smallest: float, codes_MK: Any, scales_M: Any) -> None:
    """The codes and the scale of every row."""
    for m in prange(x_MK.shape[0]):
        scales_M[m] = scale_of(x_MK[m], limit, smallest)
        quantize_row(x_MK[m], scales_M[m], limit, codes_MK[m])
