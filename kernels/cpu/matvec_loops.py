"""Few rows times a weight, row of the weight by row of the weight. Imports Numba (see `compiled.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.lanes_loops import LANES, add_row, no_sums, store_totals
from trine.kernels.cpu.numbers_loops import dot


@serial
def multiply_row(w_NK: Any, n: Any, x_MK: Any, rows: Any, y_MN: Any) -> None:
    """y[rows, n]. Four vectors of sums at least, whatever the number of rows."""
    step = LANES * max(1, 4 // len(rows))
    sums = no_sums(rows)
    whole = x_MK.shape[1] // step * step
    for k in range(0, whole, step):
        sums = add_row(sums, w_NK, n, x_MK, k, rows)
    store_totals(sums, y_MN, rows, n)
    if whole < x_MK.shape[1]:
        for m in rows:
            y_MN[m, n] += dot(w_NK[n, whole:], x_MK[m, whole:])


@serial
def finish(total: float, n: int, scales_N: Any, bias_N: Any) -> Any:
    """total scales[n] + bias[n], where there are any."""
    if scales_N.shape[0] > 0:
        total *= scales_N[n]
    return total + bias_N[n] if bias_N.shape[0] > 0 else total


@parallel
def multiply(w_NK: Any, scales_N: Any, x_MK: Any, bias_N: Any, y_MN: Any) -> None:
    """y = (x w^T) scales + bias; scales and bias may be empty. x, y, scales and bias in fp32.

    Rows of x by eights, fours, twos and one.
    """
    M = x_MK.shape[0]
    for unit in prange(w_NK.shape[0]):
        # One type each, or everything is compiled once for every type.
        n: Any = np.int64(unit)
        m: Any = np.int64(0)
        while M - m >= 8:
            multiply_row(w_NK, n, x_MK, (m, m + 1, m + 2, m + 3, m + 4, m + 5, m + 6, m + 7), y_MN)
            m += 8
        if M - m >= 4:
            multiply_row(w_NK, n, x_MK, (m, m + 1, m + 2, m + 3), y_MN)
            m += 4
        if M - m >= 2:
            multiply_row(w_NK, n, x_MK, (m, m + 1), y_MN)
            m += 2
        if M - m == 1:
            multiply_row(w_NK, n, x_MK, (m,), y_MN)
        for row in range(M):
            y_MN[row, n] = finish(y_MN[row, n], n, scales_N, bias_N)
