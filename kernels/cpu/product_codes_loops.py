"""Products of a step with weights in the layout "lanes", for a range of outputs, by one thread. Imports Numba.

What `product_loops.py` calls by address for weights of 4- and 8-bit codes with scales of groups: the tiles of
`codes_loops.py`, whose inputs are fp32 and are not rounded. One function for each number of bits, compiled when a step
first has such a weight.

Shapes: M rows, K inputs, X inputs filled up to whole chunks, N outputs, G groups.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from trine.kernels.cpu.codes_loops import multiply_rows
from trine.kernels.cpu.compiled import callback, serial
from trine.kernels.cpu.lanes_loops import LANES
from trine.kernels.cpu.memory_loops import bytes_at, floats, longs, words
from trine.kernels.cpu.product_loops import (
    CHUNK,
    FIELDS,
    GROUPS,
    INPUTS,
    OUTPUTS,
    SCALES,
    SCALES_KIND,
    WEIGHT,
    ZEROS,
)

# Codes of a word, by bits: only how many they are decides what is compiled.
_EIGHT, _FOUR = (0, 4, 8, 12, 16, 20, 24, 28), (0, 8, 16, 24)


@serial
def multiply_tiles(
    projection: Any, shifts: Any, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int
) -> None:
    """y[m, n] = sum_k w[n, k] x[m, k] for the tiles of begin <= n < end; `begin` is the first of one."""
    N, K, G, chunk = projection[OUTPUTS], projection[INPUTS], projection[GROUPS], projection[CHUNK]
    C = (K + chunk - 1) // chunk
    chunk_words, num_tiles = chunk // len(shifts), (N + LANES - 1) // LANES
    X = C * chunk
    x_MX = floats(x if X == K else prepared, num_rows * X).reshape(num_rows, X)
    codes = words(projection[WEIGHT], num_tiles * C * chunk_words * LANES)
    zeros = bytes_at(projection[ZEROS], num_tiles * G * LANES if projection[ZEROS] != 0 else 0)
    weight = (codes, (projection[SCALES], projection[SCALES_KIND]), zeros, (N, K, chunk_words, C // G))
    width = y_step // 4
    y_MN = floats(y, num_rows * width).reshape(num_rows, width)
    part_ML = np.empty((num_rows, LANES), np.float32)
    for tile in range(begin // LANES, (end + LANES - 1) // LANES):
        first = tile * LANES
        if first + LANES <= N:
            multiply_rows(weight, tile, shifts, x_MX, y_MN, first)
            continue
        multiply_rows(weight, tile, shifts, x_MX, part_ML, 0)
        for m in range(num_rows):
            for n in range(first, N):
                y_MN[m, n] = part_ML[m, n - first]


def multiply_4(fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """`multiply_tiles` of codes of 4 bits."""
    multiply_tiles(longs(fields, len(FIELDS)), _EIGHT, x, prepared, num_rows, begin, end, y, y_step)


def multiply_8(fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """`multiply_tiles` of codes of 8 bits."""
    multiply_tiles(longs(fields, len(FIELDS)), _FOUR, x, prepared, num_rows, begin, end, y, y_step)


@lru_cache(maxsize=2)
def tiles_address(bits: int) -> int:
    """The address of the function for codes of so many bits."""
    function = {4: multiply_4, 8: multiply_8}[bits]
    signature = "void(int64, int64, int64, int64, int64, int64, int64, int64)"
    return int(callback(signature)(function).address)
