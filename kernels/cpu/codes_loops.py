"""Products with weights of 4- and 8-bit codes, and dequantizing them. Imports Numba (see `compiled.py`).

A weight is laid out as in `codes.py`: tiles of 16 outputs, whose codes at one place of K lie side by side. So a vector
holds 16 outputs, their sums never have to be added across it, and scales and zero points are vectors too.

`weight` is (words, scales, zeros, shape): words int32, scales in stored numbers, zeros int8 or empty, all flat, and
shape (N, K, words of a chunk, chunks of a group). A chunk is the numbers of a row that are summed before the scale
comes in: a group, or a part of one. `shifts` has as many numbers as a word codes. X is K filled up, C chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.lanes_loops import (
    LANES,
    add_codes,
    add_scaled,
    load_lanes,
    load_words,
    no_sums,
    store_codes,
    store_lanes,
)
from trine.kernels.cpu.memory_loops import floats, halves, shorts

# Numbers of K that are dequantized at once; chunks are multiples.
DEPTH = 32
# Kinds of scales that come by address.
FLOAT32, BFLOAT16, FLOAT16 = range(3)


def load_scales(scales: Any, place: Any) -> Any:
    """scales[place + lane] in fp32, of an array; or of (address, kind), the kind of numbers not known in compiling."""
    raise NotImplementedError("compiled code only")


@overload(load_scales)
def _load_scales(scales: Any, place: Any) -> Any:  # Numba wants what it returns to have the same annotations
    def from_array(scales: Any, place: Any) -> Any:
        return load_lanes(scales, place)

    def from_address(scales: Any, place: Any) -> Any:
        address, kind = scales
        if kind == FLOAT32:
            return load_lanes(floats(address + 4 * place, LANES), 0)
        if kind == BFLOAT16:
            return load_lanes(shorts(address + 2 * place, LANES), 0)
        return load_lanes(halves(address + 2 * place, LANES), 0)

    return from_array if isinstance(scales, types.Array) else from_address


@serial
def multiply_tile(weight: Any, tile: Any, shifts: Any, x_MX: Any, rows: Any, y_MN: Any, place: Any) -> None:
    """y[rows, place + lane] of the 16 outputs of a tile."""
    words, scales, zeros, shape = weight
    chunk_words, per_group = shape[2], shape[3]
    C = x_MX.shape[1] // (chunk_words * len(shifts))
    totals = no_sums(rows)
    for c in range(C):
        first = (tile * C + c) * chunk_words
        k = c * chunk_words * len(shifts)
        group = (tile * (C // per_group) + c // per_group) * LANES
        sums = no_sums(rows)
        if zeros.shape[0] > 0:
            origin = load_lanes(zeros, group)
            for j in range(chunk_words):
                loaded = load_words(words, (first + j) * LANES)
                sums = add_codes(sums, loaded, shifts, origin, x_MX, k + j * len(shifts), rows)
        else:
            for j in range(chunk_words):
                loaded = load_words(words, (first + j) * LANES)
                sums = add_codes(sums, loaded, shifts, None, x_MX, k + j * len(shifts), rows)
        totals = add_scaled(totals, sums, load_scales(scales, group))
    store_lanes(totals, y_MN, rows, place)


@serial
def multiply_rows(weight: Any, tile: Any, shifts: Any, x_MX: Any, y_MN: Any, place: Any) -> None:
    """`multiply_tile` for all rows, by eights, fours, twos and one."""
    M = x_MX.shape[0]
    m: Any = np.int64(0)
    while M - m >= 8:
        rows = (m, m + 1, m + 2, m + 3, m + 4, m + 5, m + 6, m + 7)
        multiply_tile(weight, tile, shifts, x_MX, rows, y_MN, place)
        m += 8
    if M - m >= 4:
        multiply_tile(weight, tile, shifts, x_MX, (m, m + 1, m + 2, m + 3), y_MN, place)
        m += 4
    if M - m >= 2:
        multiply_tile(weight, tile, shifts, x_MX, (m, m + 1), y_MN, place)
        m += 2
    if M - m == 1:
        multiply_tile(weight, tile, shifts, x_MX, (m,), y_MN, place)


@parallel
def multiply_codes(weight: Any, shifts: Any, x_MX: Any, bias_N: Any, y_MN: Any) -> None:
    """y = x w^T + bias in fp32; the bias may be empty."""
    words, scales, zeros, shape = weight
    M, N = x_MX.shape[0], shape[0]
    num_tiles = (N + LANES - 1) // LANES
    whole = y_MN if N % LANES == 0 else np.empty((M, num_tiles * LANES), np.float32)
    for unit in prange(num_tiles):
        weight = (words, scales, zeros, shape)  # threads are not given tuples of tuples
        tile: Any = np.int64(unit)  # one type, or everything is compiled once for every type
        multiply_rows(weight, tile, shifts, x_MX, whole, tile * LANES)
    if N % LANES or bias_N.shape[0] > 0:
        for m in range(M):
            for n in range(N):
                y_MN[m, n] = whole[m, n] + bias_N[n] if bias_N.shape[0] > 0 else whole[m, n]


@parallel
def dequantize_codes(weight: Any, shifts: Any, first_tile: int, num_tiles: int, w_XN: Any) -> None:
    """w[k, n] = (q - z) s of the outputs of some tiles, the first ones of w; K filled up to whole chunks.

    All tiles for 32 numbers of K at a time: of more rows of w, which lie far apart, the cache would lose one half of a
    line before the next tile writes the other.
    """
    words, scales, zeros, shape = weight
    step = DEPTH // len(shifts)
    chunk_steps, per_group = shape[2] // step, shape[3]
    C = w_XN.shape[0] // (DEPTH * chunk_steps)
    for unit in prange(C * chunk_steps):
        c, first_word = unit // chunk_steps, unit % chunk_steps * step
        for t in range(num_tiles):
            tile = first_tile + t
            group = (tile * (C // per_group) + c // per_group) * LANES
            scale = load_lanes(scales, group)
            for j in range(step):
                loaded = load_words(words, ((tile * C + c) * shape[2] + first_word + j) * LANES)
                k = unit * DEPTH + j * len(shifts)
                if zeros.shape[0] > 0:
                    store_codes(loaded, shifts, load_lanes(zeros, group), scale, w_XN, k, t * LANES)
                else:
                    store_codes(loaded, shifts, None, scale, w_XN, k, t * LANES)
