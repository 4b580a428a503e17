"""Products of many rows of int8 with int8 weights [N, K] in the matrix tiles of x86 CPUs (AMX). Imports Numba.

Weights stay as they lie: 16 of their rows by 64 numbers of K are one operand of a product, which is exact in int32. The
other is 16 rows of x, in fours of K side by side, laid so once for all weights' rows. A thread takes 32 outputs; four
tiles hold the sums of 32 outputs by 32 rows, two each their numbers. Sums come output by output and are turned, scaled
and stored while they are in the fastest cache:

    y[m, n] = sums[m, n] x_scales[m] scales[n] + bias[n]        in fp32, rounded once to the numbers of y

Rows of x are taken by as many as stay in the second cache while all outputs meet them.

Shapes: M rows in tiles of 16, K inputs in blocks of 64, N outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import exact, parallel
from trine.kernels.cpu.lanes_loops import place_of
from trine.kernels.cpu.tiles_loops import aligned, call, clear, configure, release, store_sums, store_tile, turned
from trine.kernels.cpu.vector_loops import load

# Rows of a tile, numbers of K that it holds, outputs of a piece of work.
ROWS, DEPTH, OUTPUTS = 16, 64, 32
# Bytes of x that all outputs meet before the next ones: half of a server's second cache.
CACHED_BYTES = 2**20
_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_WORDS = ir.VectorType(ir.IntType(32), ROWS)


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


@intrinsic
def turn(typing: Any, source: Any, place: Any, step: Any, sink: Any, sink_place: Any) -> Any:
    """16 rows of 64 bytes, `step` apart, with their words as columns, which then follow each other; places in bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, place, step, sink, sink_place = arguments
        address = builder.ptrtoint(place_of(context, builder, signature.args[0], source, place), _LONG)
        rows = [load(builder, builder.add(address, builder.mul(step, _LONG(row))), _WORDS) for row in range(ROWS)]
        result = place_of(context, builder, signature.args[3], sink, sink_place)
        for row, vector in enumerate(turned(builder, rows)):
            at = builder.gep(result, [_LONG(DEPTH * row)])
            builder.store(vector, builder.bitcast(at, _WORDS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, sink, types.int64), generate


@parallel
def lay_fours(x: Any, width: int, laid: Any) -> None:
    """Tile, block of K, four of K, row: of rows of x, in whole tiles; both flat int8."""
    blocks, size = width // DEPTH, ROWS * DEPTH
    for tile_number in prange(x.shape[0] // (ROWS * width)):
        tile: Any = np.int64(tile_number)
        for b in range(blocks):
            turn(x, tile * ROWS * width + b * DEPTH, width, laid, (tile * blocks + b) * size)


@exact
def multiply_pair(w: Any, width: int, x: Any, pair: Any, unit: Any, sums: Any, factors: Any, y_MN: Any) -> None:
    """32 rows of y by the 32 outputs of a unit."""
    blocks, size = width // DEPTH, ROWS * DEPTH
    clear((0, 1, 2, 3))
    for b in range(blocks):
        at = 2 * pair * blocks + b
        add_products(w, unit * OUTPUTS * width + b * DEPTH, width, x, at * size, (at + blocks) * size)
    store_sums((0, 1, 2, 3), sums)
    for tile in range(4):
        m, n = (2 * pair + tile % 2) * ROWS, unit * OUTPUTS + tile // 2 * ROWS
        store_tile(sums, tile * ROWS * ROWS, factors, y_MN, m, n)


@parallel
def multiply_bytes(w: Any, width: int, x: Any, shapes: Any, factors: Any, y_MN: Any) -> None:
    """y, in fp32 or bf16, of as many rows as fill pairs of tiles; w and x flat, x as `lay_fours` leaves it.

    factors: (x_scales, scales, bias), in fp32.
    """
    M, N = y_MN.shape
    pairs, at_once = M // (2 * ROWS), max(1, CACHED_BYTES // (2 * ROWS * width))
    x_scales, scales, bias = factors
    for begin in range(0, pairs, at_once):
        for unit_number in prange(N // OUTPUTS):
            factors = (x_scales, scales, bias)  # threads are not given tuples of tuples
            unit: Any = np.int64(unit_number)
            configure(shapes)
            sums = aligned(np.empty(5 * ROWS * ROWS, np.int32))
            for pair_number in range(begin, min(pairs, begin + at_once)):
                pair: Any = np.int64(pair_number)
                multiply_pair(w, width, x, pair, unit, sums, factors, y_MN)
            release()
