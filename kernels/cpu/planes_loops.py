"""Products of several rows with 4- and 8-bit codes by whole numbers, eight planes at a time. Imports Numba.

Inputs are rounded as in `dots_loops.py`: a chunk of a row has one scale, and each part of its whole numbers (two of
int8 for bf16, four for fp32) is a plane. Planes are multiplied as rows of their own, and two of them are one sum:

    y[m] = s sum_p s_p (128 S_2p + S_2p+1)    S_p = sum_k (x_p + 128) q - 128 sum_k q    s_p = s_x 128^(parts - 2 - 2 p)

all exact in int32, by the instruction that sums four products of unsigned by signed bytes (vpdpbusd): 16 vectors of
sums, of eight planes by two tiles of 16 outputs, stay in registers along a chunk. Codes come from memory as they are
kept and are taken apart for eight planes at once: a byte of 8 bits is one, a half of one of 4 bits is 16 q. The sums of
q, which all planes share, are taken first. Zero points take s z s_x sum_k x away, in fp32. Nothing is dequantized, and
nothing of a row depends on the other rows.

Eight planes, a block, are of four rows of bf16 or of two of fp32. They lie side by side, 4 bytes each, for every slot
(as in `dots_loops.py`), behind each other for all blocks; their factors, [B, C, 16]: the scales of four pairs of planes
(fp32), as many fp32 that sum their numbers, and the sums of their codes (int32).

Shapes: M rows, K inputs, X inputs filled up to whole chunks, N outputs, C chunks, G groups, B blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.codes_loops import load_scales
from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.lanes_loops import LANES, load_lanes, multiply_add, narrow, place_of, prefetch, same
from trine.kernels.cpu.memory_loops import floats, longs, shorts, words
from trine.kernels.cpu.numbers_loops import widen
from trine.kernels.cpu.product_codes_loops import lanes_weight
from trine.kernels.cpu.product_loops import BIAS, CHUNK, FIELDS, GROUPS, INPUTS, OUTPUTS
from trine.kernels.cpu.rounding_loops import chunk_of_row, scale_of_chunk, split_in_2, split_in_4
from trine.kernels.cpu.vector_loops import add_fours, load, splat

# Planes of a block, pairs of them, tiles of outputs that meet them at once, bytes of a chunk's factors.
PLANES, PAIRS, TILES, FACTORS = 8, 4, 2, 64
# Bytes of planes that all outputs meet before the next ones: half of a server's second cache.
CACHED_BYTES = 2**19
# Four codes with 128 added to each.
UNSIGNED = 0x80808080

_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS, _CODES = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES), ir.VectorType(_BYTE, 4 * LANES)


@serial
def lay_planes(row_K: Any, chunk: int, bits: int, pairs: int, first: int, planes: int, factors: int) -> None:
    """A row in fp32 as planes of a block, from the one numbered `first` on, and their factors, to two addresses."""
    part_K = np.empty(chunk, np.float32)
    for c in range((row_K.shape[0] + chunk - 1) // chunk):
        source = chunk_of_row(row_K, c * chunk, part_K)
        scale, factor = scale_of_chunk(source, chunk, 127 << 7 * (2 * pairs - 1))
        place, own = planes + c * PLANES * chunk + 4 * first, factors + c * FACTORS
        codes = own + 4 * PLANES + 4 * first
        if pairs == 1:
            split_in_2(source, chunk, factor, bits, place, 4 * PLANES, UNSIGNED, codes)
        else:
            split_in_4(source, chunk, factor, bits, place, 4 * PLANES, UNSIGNED, codes)
        for pair in range(pairs):
            at, sums = own + 2 * first + 4 * pair, words(codes + 8 * pair, 2)
            of_pair = scale * np.float32(1 << 14 * (pairs - 1 - pair))
            floats(at, 1)[0] = of_pair
            floats(at + 2 * PLANES, 1)[0] = of_pair * np.float32(128 * sums[0] + sums[1])


@serial
def row_at(x: int, m: int, num_inputs: int, half: bool) -> Any:
    """A row of x, in bf16 (`half`) or fp32, in fp32."""
    row_K = np.empty(num_inputs, np.float32)
    if half:
        x_K = shorts(x + 2 * m * num_inputs, num_inputs)
        for k in range(num_inputs):
            row_K[k] = widen(x_K[k])
    else:
        row_K[:] = floats(x + 4 * m * num_inputs, num_inputs)
    return row_K


def _slots(builder: Any, word: Any, four: bool) -> list[Any]:
    """The signed codes of words, in fours: 8 bits as they are; 4 bits as 16 times the even and the odd ones."""
    parts = [builder.shl(word, same(4)), word] if four else [word]
    masked = [builder.and_(part, same(-0x0F0F0F10)) for part in parts] if four else parts
    return [builder.bitcast(part, _CODES) for part in masked]


@intrinsic
def sum_of_chunk(typing: Any, weights: Any, place: Any, num_words: Any, shifts: Any, sums: Any) -> Any:
    """-128 times the sum of each output's codes, int32 [16] to an address; memory ahead is asked for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, place, num_words, _, sums = arguments
        four, ones = signature.args[3].count == 8, ir.Constant(_CODES, [1] * 4 * LANES)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None)) for _ in range(1 + four)]
        with cgutils.for_range(builder, num_words) as loop:
            at = builder.add(place, builder.mul(loop.index, _LONG(LANES)))
            address = place_of(context, builder, signature.args[0], weights, at)
            prefetch(builder, address)
            word = load(builder, builder.ptrtoint(address, _LONG), _WORDS)
            for total, codes in zip(totals, _slots(builder, word, four), strict=True):
                builder.store(add_fours(builder, builder.load(total), ones, codes), total)
        sum_of_codes = builder.load(totals[0])
        for total in totals[1:]:
            sum_of_codes = builder.add(sum_of_codes, builder.load(total))
        result = builder.mul(sum_of_codes, same(-128))
        builder.store(result, builder.inttoptr(sums, _WORDS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(weights, types.int64, types.int64, shifts, types.int64), generate


@intrinsic
def add_planes(
    typing: Any, weights: Any, first: Any, second: Any, num_words: Any, shifts: Any, planes: Any, factors: Any,
    sums: Any, scales: Any, totals: Any,
) -> Any:  # fmt: skip
    """Add a chunk of two tiles times a block's planes to totals, fp32 [4, 2, 16] at an address.

    `weights`: int32, the tiles' from `first` and `second` on. `planes`, `factors`, `sums` (of both tiles, as of
    `sum_of_chunk`): addresses. `scales`: of each tile, one for each lane.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, first, second, num_words, _, planes, factors, sums, scales, totals = arguments
        four = signature.args[4].count == 8
        slots = 2 if four else 1
        starts = [load(builder, builder.add(sums, _LONG(4 * LANES * tile)), _WORDS) for tile in range(TILES)]
        own = [[cgutils.alloca_once_value(builder, start) for start in starts] for _ in range(PLANES)]
        with cgutils.for_range(builder, num_words) as loop:
            codes = []
            for tile in (first, second):
                at = builder.add(tile, builder.mul(loop.index, _LONG(LANES)))
                address = place_of(context, builder, signature.args[0], weights, at)
                prefetch(builder, address)
                word = load(builder, builder.ptrtoint(address, _LONG), _WORDS)
                codes.append(_slots(builder, word, four))
            for slot in range(slots):
                number = builder.add(builder.mul(loop.index, _LONG(slots)), _LONG(slot))
                place = builder.add(planes, builder.mul(number, _LONG(4 * PLANES)))
                for p in range(PLANES):
                    fours = builder.bitcast(
                        splat(builder, load(builder, builder.add(place, _LONG(4 * p)), _INT)), _CODES
                    )
                    for total, of_tile in zip(own[p], codes, strict=True):
                        builder.store(add_fours(builder, builder.load(total), fours, of_tile[slot]), total)
        numbers = [builder.extract_value(scale, 0) for scale in cgutils.unpack_tuple(builder, scales)]
        if four:
            numbers = [builder.fmul(number, ir.Constant(_FLOATS, [1 / 16] * LANES)) for number in numbers]
        for pair in range(PAIRS):
            scale = splat(builder, load(builder, builder.add(factors, _LONG(4 * pair)), _FLOAT))
            for tile in range(TILES):
                high, low = (builder.load(own[2 * pair + i][tile]) for i in range(2))
                exact = builder.add(builder.shl(high, same(7)), low)
                _add(builder, totals, pair, tile, builder.sitofp(exact, _FLOATS), builder.fmul(scale, numbers[tile]))
        return context.get_dummy_value()

    places = (types.int64,) * 3
    return types.void(weights, *places, shifts, *places, scales, types.int64), generate


def _add(builder: Any, totals: Any, pair: int, tile: int, a: Any, b: Any) -> None:
    """totals[pair, tile] += a b."""
    place = builder.add(totals, _LONG(4 * LANES * (TILES * pair + tile)))
    total = multiply_add(builder, a, b, load(builder, place, _FLOATS))
    builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)


@intrinsic
def take_zeros(typing: Any, factors: Any, origins: Any, scales: Any, totals: Any) -> Any:
    """Take the zero points' part of a chunk away; arguments as of `add_planes`, `origins` those points."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        factors, origins, scales, totals = arguments
        both = zip(cgutils.unpack_tuple(builder, origins), cgutils.unpack_tuple(builder, scales), strict=True)
        parts = [builder.fmul(*(builder.extract_value(part, 0) for part in pair)) for pair in both]
        for pair in range(PAIRS):
            numbers = load(builder, builder.add(factors, _LONG(4 * (PAIRS + pair))), _FLOAT)
            whole = builder.fsub(ir.Constant(_FLOATS, [-0.0] * LANES), splat(builder, numbers))
            for tile in range(TILES):
                _add(builder, totals, pair, tile, whole, parts[tile])
        return context.get_dummy_value()

    return types.void(types.int64, origins, scales, types.int64), generate


@intrinsic
def write_lanes(typing: Any, totals: Any, pairs: Any, bias: Any, half: Any, y: Any) -> Any:
    """16 results at y, in bf16 (`half`) or fp32: the totals of one pair of planes or of two added up, and the bias."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, pairs, bias, half, y = arguments
        first = load(builder, totals, _FLOATS)
        second = load(builder, builder.add(totals, _LONG(4 * LANES * TILES)), _FLOATS)
        both = builder.icmp_signed(">", pairs, _LONG(1))
        total = builder.select(both, builder.fadd(first, second), first)
        total = builder.fadd(total, load(builder, bias, _FLOATS))
        with builder.if_else(half) as (then, otherwise):
            for block, kind in ((then, types.uint16), (otherwise, types.float32)):
                with block:
                    stored = narrow(builder, kind, total)
                    builder.store(stored, builder.inttoptr(y, stored.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.boolean, types.int64), generate


@serial
def multiply_unit(
    fields: int, shifts: Any, unit: Any, planes: int, factors: int, pairs: int, num_rows: int, y: int, half: bool
) -> None:
    """y of two tiles of outputs, for rows that are laid as planes."""
    projection = longs(fields, len(FIELDS))
    (codes, scales, zeros, shape), C = lanes_weight(projection, len(shifts))
    num_tiles, G, chunk = (projection[OUTPUTS] + LANES - 1) // LANES, projection[GROUPS], projection[CHUNK]
    first, second, step = TILES * unit, min(TILES * unit + 1, num_tiles - 1), shape[2] * LANES
    rows = PAIRS // pairs
    # One row of a pair more, which is read (and not used) behind the last.
    sums, totals = np.empty(C * TILES * LANES, np.int32), np.empty((PAIRS + 1) * TILES * LANES, np.float32)
    for block in range((num_rows + rows - 1) // rows):
        totals[:] = 0
        for c in range(C):
            group = c // (C // G) * LANES
            left, right = first * G * LANES + group, second * G * LANES + group
            both = (load_scales(scales, left), load_scales(scales, right))
            at = ((first * C + c) * step, (second * C + c) * step)
            own, of_chunk = factors + (block * C + c) * FACTORS, sums.ctypes.data + 4 * c * TILES * LANES
            if block == 0:
                sum_of_chunk(codes, at[0], shape[2], shifts, of_chunk)
                sum_of_chunk(codes, at[1], shape[2], shifts, of_chunk + 4 * LANES)
            place = planes + (block * C + c) * PLANES * chunk
            add_planes(
                codes, at[0], at[1], shape[2], shifts, place, own, of_chunk, both, totals.ctypes.data
            )  # fmt: skip
            if zeros.shape[0] > 0:
                take_zeros(own, (load_lanes(zeros, left), load_lanes(zeros, right)), both, totals.ctypes.data)
        for row in range(min(rows, num_rows - block * rows)):
            for tile in range(second - first + 1):
                n = (first + tile) * LANES
                of_row = totals.ctypes.data + 4 * LANES * (row * pairs * TILES + tile)
                to = y + (2 if half else 4) * ((block * rows + row) * num_tiles * LANES + n)
                write_lanes(of_row, pairs, projection[BIAS] + 4 * n, half, to)


@parallel
def multiply_planes(fields: int, shifts: Any, bits: int, pairs: int, x: int, num_rows: int, y: int, half: bool) -> None:
    """y = x w^T + bias, both in bf16 (`half`) or fp32, with as many outputs as fill tiles, as the bias has.

    All by address; `pairs` of planes for each row. Rows are taken by as many as stay in the cache.
    """
    projection = longs(fields, len(FIELDS))
    N, K, chunk = projection[OUTPUTS], projection[INPUTS], projection[CHUNK]
    num_tiles, C, rows = (N + LANES - 1) // LANES, (K + chunk - 1) // chunk, PAIRS // pairs
    at_once = max(1, CACHED_BYTES // (PLANES * C * chunk))
    blocks = max(1, min(at_once, (num_rows + rows - 1) // rows))
    planes, factors = np.empty(blocks * C * PLANES * chunk, np.int8), np.zeros(blocks * C * FACTORS, np.int8)
    for begin in range(0, num_rows, blocks * rows):
        count = min(num_rows - begin, blocks * rows)
        for m in prange(count):
            to, own = planes.ctypes.data + m // rows * C * PLANES * chunk, factors.ctypes.data + m // rows * C * FACTORS
            lay_planes(row_at(x, begin + m, K, half), chunk, bits, pairs, m % rows * 2 * pairs, to, own)
        for unit in prange((num_tiles + TILES - 1) // TILES):
            to = y + (2 if half else 4) * begin * num_tiles * LANES
            multiply_unit(fields, shifts, unit, planes.ctypes.data, factors.ctypes.data, pairs, count, to, half)
