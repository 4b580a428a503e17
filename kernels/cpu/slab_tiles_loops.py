"""Products of many bf16 rows with 4- and 8-bit codes in the matrix tiles of x86 CPUs (AMX). Imports Numba.

A thread dequantizes 32 outputs of a weight, rounded once to bf16, into a slab of memory that its cache holds, in pairs
of K side by side, as the tiles want one operand; then all rows meet them, 32 at a time: four tiles hold the sums of 32
rows by 32 outputs, two each their numbers. So a weight is neither written to memory nor read from it but as codes. Rows
are copied before, tile by tile: rows a power of two apart would push each other out of the fastest cache.

`weight` and `shifts` as in `codes_loops.py`. Rows of x are taken by as many as stay in the second cache.

Shapes: M rows in tiles of 16, X inputs in blocks of 32 and filled up to whole chunks, N outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trine.kernels.cpu.byte_tiles_loops import CACHED_BYTES
from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.lanes_loops import LANES, codes_of, load_lanes, load_words, narrow, place_of, same
from trine.kernels.cpu.tiles_loops import DEPTH, ROWS, aligned, call, clear, configure, release, store_sums, store_tile

# Lanes tiles of a piece of work; numbers of a tile of bf16.
HALVES, SIZE = 2, ROWS * DEPTH
_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_WORDS, _LINE = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.IntType(16), DEPTH)


@intrinsic
def store_scaled_pairs(typing: Any, words: Any, shifts: Any, origin: Any, scale: Any, slab: Any, place: Any) -> Any:
    """Write (codes - origin) scale as bf16, two neighbours of K of each output side by side, from a place on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, _, origin, scale, slab, place = arguments
        scale, narrowed = builder.extract_value(scale, 0), []
        for code in codes_of(builder, words, signature.args[1].count):
            if signature.args[2] != types.none:
                code = builder.fsub(code, builder.extract_value(origin, 0))
            narrowed.append(builder.zext(narrow(builder, types.uint16, builder.fmul(code, scale)), _WORDS))
        for index in range(0, len(narrowed), 2):
            joined = builder.or_(narrowed[index], builder.shl(narrowed[index + 1], same(16)))
            at = builder.add(place, _LONG(index * LANES))
            address = place_of(context, builder, signature.args[4], slab, at)
            builder.store(joined, builder.bitcast(address, _WORDS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(words, shifts, origin, scale, slab, types.int64), generate


@intrinsic
def copy_line(typing: Any, source: Any, place: Any, sink: Any, sink_place: Any) -> Any:
    """64 bytes of one array of bf16 to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, place, sink, sink_place = arguments
        addresses = [
            builder.bitcast(place_of(context, builder, kind, array, at), _LINE.as_pointer())
            for kind, array, at in ((signature.args[0], source, place), (signature.args[2], sink, sink_place))
        ]
        builder.store(builder.load(addresses[0], align=2), addresses[1], align=2)
        return context.get_dummy_value()

    return types.void(source, types.int64, sink, types.int64), generate


@intrinsic
def add_products(typing: Any, x: Any, first: Any, second: Any, slab: Any, left: Any, right: Any) -> Any:
    """Add two tiles of x times two of the slab to tiles 0 to 3."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, first, second, slab, left, right = arguments
        for tile, kind, array, at in ((4, 0, x, first), (5, 0, x, second), (6, 3, slab, left), (7, 3, slab, right)):
            address = place_of(context, builder, signature.args[kind], array, at)
            call(builder, "tileloadd64", _BYTE(tile), builder.bitcast(address, _BYTE.as_pointer()), _LONG(2 * DEPTH))
        for tile in range(4):
            call(builder, "tdpbf16ps", _BYTE(tile), _BYTE(4 + tile // 2), _BYTE(6 + tile % 2))
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, slab, types.int64, types.int64), generate


@parallel
def lay_tiles(x: Any, width: int, laid: Any) -> None:
    """Tile, block of K, row, number: of rows of bf16 in whole tiles; both flat."""
    blocks = width // DEPTH
    for tile_number in prange(x.shape[0] // (ROWS * width)):
        tile: Any = np.int64(tile_number)
        for b in range(blocks):
            for m in range(ROWS):
                copy_line(x, (tile * ROWS + m) * width + b * DEPTH, laid, (tile * blocks + b) * SIZE + m * DEPTH)


@serial
def fill_slab(weight: Any, tile: Any, shifts: Any, slab: Any, place: Any) -> None:
    """The 16 outputs of a tile of lanes, dequantized, from a place of the slab on."""
    words, scales, zeros, shape = weight
    chunk_words, per_group = shape[2], shape[3]
    C = (shape[1] + chunk_words * len(shifts) - 1) // (chunk_words * len(shifts))
    step = len(shifts) * LANES
    for c in range(C):
        group = (tile * (C // per_group) + c // per_group) * LANES
        scale = load_lanes(scales, group)
        for j in range(c * chunk_words, (c + 1) * chunk_words):
            loaded = load_words(words, (tile * C * chunk_words + j) * LANES)
            if zeros.shape[0] > 0:
                store_scaled_pairs(loaded, shifts, load_lanes(zeros, group), scale, slab, place + j * step)
            else:
                store_scaled_pairs(loaded, shifts, None, scale, slab, place + j * step)


@serial
def multiply_pair(x: Any, blocks: int, pair: Any, unit: Any, slab: Any, sums: Any, bias: Any, y_MX: Any) -> None:
    """32 rows of y by the 32 outputs of a unit, or by 16 of them."""
    clear((0, 1, 2, 3))
    for b in range(blocks):
        at = 2 * pair * blocks + b
        add_products(x, at * SIZE, (at + blocks) * SIZE, slab, b * SIZE, (blocks + b) * SIZE)
    store_sums((0, 1, 2, 3), sums)
    for tile in range(4):
        m, n = (2 * pair + tile // 2) * ROWS, (HALVES * unit + tile % 2) * LANES
        if n < y_MX.shape[1]:
            store_tile(sums, tile * ROWS * LANES, (bias,), y_MX, m, n)


@parallel
def multiply_slabs(weight: Any, shifts: Any, x: Any, width: int, shapes: Any, bias: Any, y_MX: Any) -> None:
    """y = x w^T + bias in bf16 or fp32, as many outputs as fill tiles of lanes; x as `lay_tiles` leaves it, in pairs of
    tiles; the bias may be empty.
    """
    words, scales, zeros, shape = weight
    M, num_tiles, blocks = y_MX.shape[0], y_MX.shape[1] // LANES, width // DEPTH
    pairs, at_once = M // (2 * ROWS), max(1, CACHED_BYTES // (4 * ROWS * width))
    for begin in range(0, pairs, at_once):
        for unit_number in prange((num_tiles + HALVES - 1) // HALVES):
            weight = (words, scales, zeros, shape)  # threads are not given tuples of tuples
            unit: Any = np.int64(unit_number)
            slab = aligned(np.empty(HALVES * blocks * SIZE + DEPTH, np.uint16))
            for half in range(HALVES):
                tile = min(unit * HALVES + half, num_tiles - 1)
                fill_slab(weight, tile, shifts, slab, half * blocks * SIZE)
            configure(shapes)
            sums = aligned(np.empty(5 * ROWS * LANES, np.float32))
            for pair_number in range(begin, min(pairs, begin + at_once)):
                pair: Any = np.int64(pair_number)
                multiply_pair(x, blocks, pair, unit, slab, sums, bias, y_MX)
            release()
