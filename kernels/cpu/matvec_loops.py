"""Few rows times a weight, row of the weight by row of the weight. Imports Numba (see `compiled.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.numbers_loops import add_product, dot, widen


@serial
def dot_pair(row: Any, x: Any, other: Any) -> Any:
    """`dot` with two rows, the weight's numbers converted once. (With three the rows leave the fastest cache.)"""
    total, second = np.float32(0), np.float32(0)
    for j in range(x.shape[0]):
        weight = widen(row[j])
        total += weight * x[j]
        second += weight * other[j]
    return total, second


@serial
def finish(total: float, n: int, scales_N: Any, bias_N: Any) -> Any:
    """total scales[n] + bias[n], where there are any."""
    if scales_N.shape[0] > 0:
        total *= scales_N[n]
    return total + bias_N[n] if bias_N.shape[0] > 0 else total


@parallel
def multiply(w_NK: Any, scales_N: Any, x_MK: Any, bias_N: Any, y_MN: Any) -> None:
    """y = (x w^T) scales + bias; scales and bias may be empty. x, y, scales and bias in fp32."""
    pairs = x_MK.shape[0] // 2
    for n in prange(w_NK.shape[0]):
        row = w_NK[n]
        for p in range(pairs):
            total, second = dot_pair(row, x_MK[2 * p], x_MK[2 * p + 1])
            y_MN[2 * p, n] = finish(total, n, scales_N, bias_N)
            y_MN[2 * p + 1, n] = finish(second, n, scales_N, bias_N)
        for m in range(2 * pairs, x_MK.shape[0]):
            y_MN[m, n] = finish(dot(row, x_MK[m]), n, scales_N, bias_N)


@serial
def dot_int8(row: Any, x: Any) -> Any:
    """The exact sum of row[j] x[j] of two rows of int8."""
    total = np.int32(0)
    for j in range(x.shape[0]):
        total = add_product(total, row[j], x[j])
    return total


@parallel
def multiply_int8(w_NK: Any, scales_N: Any, x_MK: Any, x_scales_M: Any, bias_N: Any, y_MN: Any) -> None:
    """As `multiply` for int8 codes on both sides, each with its scale."""
    for n in prange(w_NK.shape[0]):
        row = w_NK[n]
        for m in range(x_MK.shape[0]):
            total = np.float32(dot_int8(row, x_MK[m])) * x_scales_M[m]
            y_MN[m, n] = finish(total, n, scales_N, bias_N)
