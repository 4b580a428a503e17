"""Products of many rows of int8 with int8 weights [N, K] in the matrix tiles of x86 CPUs (AMX). Imports Numba.

Weights stay as they lie: 16 of their rows by 64 numbers of K are one operand of a product, which is exact in int32. The
other is 16 rows of x, in fours of K side by side (`byte_tiles.py` lays them so). A thread takes 32 outputs; four tiles
hold the sums of 32 outputs by 32 rows, two each their numbers.

Shapes: M rows in tiles of 16, K inputs in blocks of 64, N outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import parallel
from trine.kernels.cpu.lanes_loops import place_of
from trine.kernels.cpu.tiles_loops import call, clear, configure, release, store_sums

# Rows of a tile, numbers of K that it holds, outputs of a piece of work.
ROWS, DEPTH, OUTPUTS = 16, 64, 32
_BYTE, _LONG = ir.IntType(8), ir.IntType(64)


@intrinsic
def add_products(typing: Any, w: Any, place: Any, w_step: Any, x: Any, first: Any, second: Any) -> Any:
    """Add w[place], 32 rows `w_step` apart, times two tiles of x, from `first` and `second` on, to tiles 0 to 3."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, place, w_step, x, first, second = arguments
        below = builder.add(place, builder.mul(w_step, _LONG(ROWS)))
        operands = ((4, 0, w, place, w_step), (5, 0, w, below, w_step), (6, 3, x, first, None), (7, 3, x, second, None))
        for tile, kind, array, at, step in operands:
            address = place_of(context, builder, signature.args[kind], array, at)
            call(builder, "tileloadd64", _BYTE(tile), address, _LONG(DEPTH) if step is None else step)
        for tile in range(4):
            call(builder, "tdpbssd", _BYTE(tile), _BYTE(4 + tile // 2), _BYTE(6 + tile % 2))
        return context.get_dummy_value()

    return types.void(w, types.int64, types.int64, x, types.int64, types.int64), generate


@parallel
def multiply_bytes(w: Any, width: int, x: Any, shapes: Any, y_MN: Any) -> None:
    """y = x w^T as fp32, rows of y in pairs of tiles, of which the last may be filled up; w and x flat."""
    M, N = y_MN.shape
    blocks, size = width // DEPTH, ROWS * DEPTH
    for unit in prange(N // OUTPUTS):
        configure(shapes)
        sums = np.empty(4 * ROWS * ROWS, np.int32)
        for pair in range((M + 2 * ROWS - 1) // (2 * ROWS)):
            clear((0, 1, 2, 3))
            for b in range(blocks):
                at = 2 * pair * blocks + b
                place = unit * OUTPUTS * width + b * DEPTH
                add_products(w, place, width, x, at * size, (at + blocks) * size)
            store_sums((0, 1, 2, 3), sums)
            sums_NM = sums.reshape(2, 2, ROWS, ROWS)
            for m in range(2 * pair * ROWS, min(M, 2 * (pair + 1) * ROWS)):
                for half in range(2):
                    for n in range(ROWS):
                        total = sums_NM[half, m // ROWS % 2, n, m % ROWS]
                        y_MN[m, unit * OUTPUTS + half * ROWS + n] = np.float32(total)
        release()
