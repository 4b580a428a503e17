"""Products of rows of int8 with plain int8 weights, by one instruction for 64 codes. Imports Numba (see `compiled.py`).

    y[m, n] = (sum_k x[m, k] w[n, k]) x_scales[m] scales[n] + bias[n]        sums exact, then fp32, rounded once

A thread takes some outputs, of which six rows of the weight stay in the fastest cache while all rows of x meet them,
four at a time (`vector_loops.py`): 24 vectors of sums. The next six are asked for meanwhile. Weights lie as they are
kept, rows of x as they are or, where they are no whole blocks of 64, once more.

Shapes: M rows, K inputs, X inputs filled up to whole blocks, N outputs.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import parallel
from trine.kernels.cpu.memory_loops import bytes_at, floats, shorts, words
from trine.kernels.cpu.numbers_loops import to_bf16
from trine.kernels.cpu.product_loops import lay_token, sum_codes, sum_tokens
from trine.kernels.cpu.vector_loops import STREAMS

# Outputs of a piece of work, and rows of x that meet them before the next.
OUTPUTS, ROWS = 8 * STREAMS, 64


@parallel
def lay_tokens(x: int, num_rows: int, num_inputs: int, width: int, scales: int, laid: int, factors: int) -> None:
    """Rows of codes at x in blocks to `laid`, unless they are there already, and their factors; all by address."""
    for m in prange(num_rows):
        codes_K = bytes_at(x + m * num_inputs, num_inputs)
        if laid != x:
            lay_token(codes_K, bytes_at(laid + m * width, width))
        floats(factors + 8 * m, 1)[0] = floats(scales, num_rows)[m]
        words(factors + 8 * m + 4, 1)[0] = np.int32(-128) * sum_codes(codes_K)


@parallel
def multiply_tokens(
    w: int, num_outputs: int, num_inputs: int, x: int, width: int, factors: int, num_rows: int, scales: int, bias: int,
    y: int, half: bool,
) -> None:  # fmt: skip
    """y in bf16 (`half`) or fp32; all by address, x and factors as of `lay_tokens`, bias 0 for none."""
    for piece in prange((num_outputs + OUTPUTS - 1) // OUTPUTS):
        begin = piece * OUTPUTS
        count = min(OUTPUTS, num_outputs - begin)
        apart = min(1, count // STREAMS)  # fewer rows than are taken at once: one of them as often
        sums, ahead = np.empty(ROWS * OUTPUTS, np.float32), STREAMS * num_inputs
        scales_n = floats(scales + 4 * begin, count)
        bias_n = floats(bias + 4 * begin, count if bias != 0 else 0)
        for first in range(0, num_rows, ROWS):
            rows = min(ROWS, num_rows - first)
            for group in range(0, count, STREAMS if apart else 1):
                n = min(group, count - STREAMS) if apart else group
                row, place = w + (begin + n) * num_inputs, sums.ctypes.data + 4 * n
                codes, own = x + first * width, factors + 8 * first
                sum_tokens(
                    row, apart * num_inputs, num_inputs, codes, width, own, rows, place, 4 * OUTPUTS, apart, ahead
                )
            for m in range(rows):
                sums_n = sums[m * OUTPUTS : m * OUTPUTS + count]
                for n in range(count):
                    sums_n[n] *= scales_n[n]
                for n in range(bias_n.shape[0]):
                    sums_n[n] += bias_n[n]
                number = (first + m) * num_outputs + begin
                if half:
                    y_n = shorts(y + 2 * number, count)
                    for n in range(count):
                        y_n[n] = to_bf16(sums_n[n])
                else:
                    y_n32 = floats(y + 4 * number, count)
                    for n in range(count):
                        y_n32[n] = sums_n[n]
