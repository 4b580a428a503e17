"""Products of a step with weights in the layout "lanes", for a range of outputs, by one thread. Imports Numba.

What `product_loops.py` calls by address for weights of 4- and 8-bit codes with scales of groups: on CPUs that have the
instruction for it by whole numbers (`dots_loops.py`), elsewhere in fp32 (`codes_loops.py`). Either way inputs are not
rounded by more than sums in fp32 are. There is a function for each number of bits, compiled when a step first has such
a weight.

Shapes: M rows, K inputs, X inputs filled up to whole chunks, N outputs, G groups.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from trine.kernels.cpu.codes_loops import load_scales, multiply_rows
from trine.kernels.cpu.compiled import callback, serial
from trine.kernels.cpu.dots_loops import FACTORS, PARTS, add_chunk, row_bytes, take_zeros
from trine.kernels.cpu.lanes_loops import LANES, load_lanes
from trine.kernels.cpu.memory_loops import bytes_at, floats, longs, words
from trine.kernels.cpu.product_loops import (
    CHUNK,
    DOTS,
    FIELDS,
    GROUPS,
    INPUTS,
    OUTPUTS,
    SCALES,
    SCALES_KIND,
    TILES,
    WEIGHT,
    ZEROS,
)

# Tiles that one row meets at once. They are far apart: what hides waiting for memory is the prefetcher of the hardware,
# which follows each of them on its own (as rows in `vector_loops.py`).
AT_ONCE = 4
# Codes of a word, by bits: only how many they are decides what is compiled.
_EIGHT, _FOUR = (0, 4, 8, 12, 16, 20, 24, 28), (0, 8, 16, 24)


@serial
def lanes_weight(projection: Any, num_codes: int) -> Any:
    """(words, scales, zeros, shape) as `codes_loops.py` takes them, scales by address; the number of chunks."""
    N, K, G, chunk = projection[OUTPUTS], projection[INPUTS], projection[GROUPS], projection[CHUNK]
    C = (K + chunk - 1) // chunk
    chunk_words, num_tiles = chunk // num_codes, (N + LANES - 1) // LANES
    codes = words(projection[WEIGHT], num_tiles * C * chunk_words * LANES)
    zeros = bytes_at(projection[ZEROS], num_tiles * G * LANES if projection[ZEROS] != 0 else 0)
    scales = (projection[SCALES], projection[SCALES_KIND])
    return (codes, scales, zeros, (N, K, chunk_words, C // G)), C


@serial
def multiply_tiles(
    projection: Any, shifts: Any, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int
) -> None:
    """y[m, n] = sum_k w[n, k] x[m, k] for the tiles of begin <= n < end, in fp32; `begin` is the first of one."""
    weight, C = lanes_weight(projection, len(shifts))
    N, X = projection[OUTPUTS], C * projection[CHUNK]
    x_MX = floats(x if projection[INPUTS] == X else prepared, num_rows * X).reshape(num_rows, X)
    y_MN = floats(y, num_rows * (y_step // 4)).reshape(num_rows, y_step // 4)
    part_ML = np.empty((num_rows, LANES), np.float32)
    for tile in range(begin // LANES, (min(end, N) + LANES - 1) // LANES):
        if tile * LANES + LANES <= N:
            multiply_rows(weight, tile, shifts, x_MX, y_MN, tile * LANES)
        else:
            multiply_rows(weight, tile, shifts, x_MX, part_ML, 0)
            copy_part(part_ML, tile * LANES, N, y_MN)


@serial
def copy_part(part_ML: Any, first: int, last: int, y_MN: Any) -> None:
    """Results of the last tile, where it has less than 16 outputs."""
    for m in range(part_ML.shape[0]):
        for n in range(first, last):
            y_MN[m, n] = part_ML[m, n - first]


@serial
def add_tile(weight: Any, tile: Any, shifts: Any, x: Any, rows: Any, totals: Any, y_MN: Any, place: Any) -> None:
    """y[row, place + lane] of a tile, for all of `rows`; totals: as many times 16 numbers to work in.

    x: (address of prepared rows, bytes of one, chunks of one).
    """
    codes, scales, zeros, shape = weight
    chunk_words, per_group = shape[2], shape[3]
    place_of_rows, x_step, C = x
    chunk, row = chunk_words * len(shifts), place_of_rows + rows[0] * x_step
    totals[:] = 0
    for c in range(C):
        at, factors = row + c * PARTS * chunk, row + C * PARTS * chunk + c * FACTORS
        group = (tile * (C // per_group) + c // per_group) * LANES
        first, own = ((tile * C + c) * chunk_words * LANES,), (load_scales(scales, group),)
        add_chunk(totals.ctypes.data, codes, first, chunk_words, shifts, at, x_step, factors, own, rows)
        if zeros.shape[0] > 0:
            take_zeros(totals.ctypes.data, factors, x_step, (load_lanes(zeros, group),), own, rows)
    for m in range(len(rows)):
        copy_lanes(totals, m * LANES, y_MN[rows[m]], place)


@serial
def add_four_tiles(weight: Any, tile: Any, apart: Any, shifts: Any, x: Any, m: Any, totals: Any, y_MN: Any) -> None:
    """y[m] of four tiles, `apart` from each other: what is loaded of x meets all of them."""
    codes, scales, zeros, shape = weight
    chunk_words, per_group = shape[2], shape[3]
    place_of_rows, x_step, C = x
    chunk, row, G = chunk_words * len(shifts), place_of_rows + m * x_step, C // per_group
    rows, step = (m,), apart * C * chunk_words * LANES
    totals[:] = 0
    for c in range(C):
        at, factors = row + c * PARTS * chunk, row + C * PARTS * chunk + c * FACTORS
        group, first, far = (tile * G + c // per_group) * LANES, (tile * C + c) * chunk_words * LANES, apart * G * LANES
        own = (
            load_scales(scales, group), load_scales(scales, group + far), load_scales(scales, group + 2 * far),
            load_scales(scales, group + 3 * far),
        )  # fmt: skip
        places = (first, first + step, first + 2 * step, first + 3 * step)
        add_chunk(totals.ctypes.data, codes, places, chunk_words, shifts, at, x_step, factors, own, rows)
        if zeros.shape[0] > 0:
            points = (
                load_lanes(zeros, group), load_lanes(zeros, group + far), load_lanes(zeros, group + 2 * far),
                load_lanes(zeros, group + 3 * far),
            )  # fmt: skip
            take_zeros(totals.ctypes.data, factors, x_step, points, own, rows)
    for number in range(AT_ONCE):
        copy_lanes(totals, number * LANES, y_MN[m], (tile + number * apart) * LANES)


@serial
def copy_lanes(totals: Any, first: Any, y_N: Any, place: Any) -> None:
    """16 totals, to a place."""
    for lane in range(LANES):
        y_N[place + lane] = totals[first + lane]


@serial
def add_rows(weight: Any, tile: Any, shifts: Any, x: Any, totals: Any, y_MN: Any, place: Any) -> None:
    """`add_tile` for all rows, by fours and one by one."""
    m: Any = np.int64(0)
    while y_MN.shape[0] - m >= 4:
        add_tile(weight, tile, shifts, x, (m, m + 1, m + 2, m + 3), totals, y_MN, place)
        m += 4
    while m < y_MN.shape[0]:
        add_tile(weight, tile, shifts, x, (m,), totals, y_MN, place)
        m += 1


@serial
def multiply_dots(
    projection: Any, shifts: Any, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int
) -> None:
    """As `multiply_tiles`, by whole numbers; of one row, or what fours leave over, four tiles at once."""
    weight, C = lanes_weight(projection, len(shifts))
    N, chunk = projection[OUTPUTS], projection[CHUNK]
    x = (prepared, row_bytes(projection[INPUTS], chunk), C)
    y_MN = floats(y, num_rows * (y_step // 4)).reshape(num_rows, y_step // 4)
    part_ML, totals = np.empty((num_rows, LANES), np.float32), np.empty(AT_ONCE * LANES, np.float32)
    first, last = begin // LANES, min(end, N) // LANES
    apart, whole = (last - first) // AT_ONCE, num_rows // 4 * 4
    for tile in range(first, first + apart):
        for number in range(AT_ONCE if whole > 0 else 0):
            at = tile + number * apart
            add_rows(weight, at, shifts, x, totals, y_MN[:whole], at * LANES)
        for m in range(whole, num_rows):
            add_four_tiles(weight, tile, apart, shifts, x, m, totals, y_MN)
    for tile in range(first + AT_ONCE * apart, last):
        add_rows(weight, tile, shifts, x, totals, y_MN, tile * LANES)
    if last * LANES < min(end, N):
        add_rows(weight, last, shifts, x, totals, part_ML, 0)
        copy_part(part_ML, last * LANES, N, y_MN)


def tiles_4(fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """`multiply_tiles` of codes of 4 bits."""
    multiply_tiles(longs(fields, len(FIELDS)), _EIGHT, x, prepared, num_rows, begin, end, y, y_step)


def tiles_8(fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """`multiply_tiles` of codes of 8 bits."""
    multiply_tiles(longs(fields, len(FIELDS)), _FOUR, x, prepared, num_rows, begin, end, y, y_step)


def dots_4(fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """`multiply_dots` of codes of 4 bits."""
    multiply_dots(longs(fields, len(FIELDS)), _EIGHT, prepared, num_rows, begin, end, y, y_step)


def dots_8(fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """`multiply_dots` of codes of 8 bits."""
    multiply_dots(longs(fields, len(FIELDS)), _FOUR, prepared, num_rows, begin, end, y, y_step)


@lru_cache(maxsize=4)
def lanes_address(kind: int, bits: int) -> int:
    """The address of the function for a kind of projection and a number of bits."""
    function = {(TILES, 4): tiles_4, (TILES, 8): tiles_8, (DOTS, 4): dots_4, (DOTS, 8): dots_8}[kind, bits]
    signature = "void(int64, int64, int64, int64, int64, int64, int64, int64)"
    return int(callback(signature)(function).address)
