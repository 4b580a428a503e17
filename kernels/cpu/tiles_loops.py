"""Products of 8 to 64 bf16 rows with 4- and 8-bit codes in the matrix tiles of x86 CPUs (AMX). Imports Numba.

A tile holds 16 rows of 64 bytes; one instruction multiplies 16 rows by 16 outputs over 32 numbers of K. Codes minus
their zero points are whole numbers below 257 in size, which bf16 holds exactly: they are multiplied as such, a group's
sums are scaled in fp32, and nothing is rounded but the result. The weight is read and decoded once for 64 rows.

`weight` and `shifts` as in `codes_loops.py`. Tiles 0 to 3 hold the sums of up to 64 rows, 4 and 5 rows of x in turns, 6
codes. Before, the process has to ask for tiles (`codes.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.lanes_loops import (
    LANES,
    codes_of,
    load_as_floats,
    load_lanes,
    load_words,
    multiply_add,
    narrow,
    place_of,
    same,
)
from trine.kernels.cpu.vector_loops import splat

# Rows of a tile, numbers of K that it holds, and rows that are multiplied at once.
ROWS, DEPTH, MOST_ROWS = 16, 32, 64
_CODES = 6

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = _BYTE.as_pointer()
_WORDS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)


def call(builder: Any, name: str, *arguments: Any) -> None:
    """Call an instruction that LLVM has for x86."""
    signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.{name}"), arguments)


@serial
def aligned(x: Any) -> Any:
    """x from where a line of the cache begins: tiles whose rows cross lines take six times as long. x has one more."""
    return x[-x.ctypes.data % 64 // x.itemsize :]


@intrinsic
def configure(typing: Any, shapes: Any) -> Any:
    """Give this thread's tiles the shapes of a table of 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "ldtilecfg", place_of(context, builder, signature.args[0], arguments[0], _LONG(0)))
        return context.get_dummy_value()

    return types.void(shapes), generate


@intrinsic
def release(typing: Any) -> Any:
    """Give the tiles back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def clear(typing: Any, tiles: Any) -> Any:
    """Sums of zero in as many tiles as the tuple has numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for tile in range(signature.args[0].count):
            call(builder, "tilezero", _BYTE(tile))
        return context.get_dummy_value()

    return types.void(tiles), generate


@intrinsic
def multiply(typing: Any, tiles: Any, x: Any, first: Any, k: Any, pairs: Any) -> Any:
    """Add x[first : first + 16 len(tiles), k : k + 32] (bf16) times the codes of `pairs` to the sums."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, first, k, pairs = arguments
        codes = place_of(context, builder, signature.args[4], pairs, _LONG(0))
        call(builder, "tileloadd64", _BYTE(_CODES), builder.bitcast(codes, _POINTER), _LONG(64))
        view = context.make_array(signature.args[1])(context, builder, x)
        step = builder.mul(cgutils.unpack_tuple(builder, view.shape)[1], _LONG(2))
        for tile in range(signature.args[0].count):
            row = builder.add(first, _LONG(ROWS * tile))
            address = place_of(context, builder, signature.args[1], x, row, k)
            loaded = _BYTE(4 + tile % 2)
            call(builder, "tileloadd64", loaded, builder.bitcast(address, _POINTER), step)
            call(builder, "tdpbf16ps", _BYTE(tile), loaded, _BYTE(_CODES))
        return context.get_dummy_value()

    return types.void(tiles, x, types.int64, types.int64, pairs), generate


@intrinsic
def store_sums(typing: Any, tiles: Any, sums: Any) -> Any:
    """Write the sums to fp32 [16 len(tiles), 16]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for tile in range(signature.args[0].count):
            place = place_of(context, builder, signature.args[1], arguments[1], _LONG(ROWS * LANES * tile))
            call(builder, "tilestored64", _BYTE(tile), builder.bitcast(place, _POINTER), _LONG(64))
        return context.get_dummy_value()

    return types.void(tiles, sums), generate


@intrinsic
def store_pairs(typing: Any, words: Any, shifts: Any, origin: Any, pairs: Any, place: Any) -> Any:
    """Write codes minus origin (or None) as bf16: two neighbours of K of each output side by side, from a place on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, _, origin, pairs, place = arguments
        numbers = codes_of(builder, words, signature.args[1].count)
        if signature.args[2] != types.none:
            numbers = [builder.fsub(number, builder.extract_value(origin, 0)) for number in numbers]
        kind = ir.VectorType(_INT, LANES)
        for index in range(0, len(numbers), 2):
            even, odd = (builder.bitcast(number, kind) for number in numbers[index : index + 2])
            joined = builder.or_(builder.lshr(even, same(16)), odd)  # whole numbers this small end with 16 zeros
            at = builder.add(place, _LONG(index // 2 * LANES))
            address = place_of(context, builder, signature.args[3], pairs, at)
            builder.store(joined, builder.bitcast(address, kind.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(words, shifts, origin, pairs, types.int64), generate


@intrinsic
def add_lanes(typing: Any, total: Any, place: Any, sums: Any, scale: Any) -> Any:
    """total[place + lane] += sums[place + lane] scale."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, place, sums, scale = arguments
        before = load_as_floats(context, builder, signature.args[0], total, place)
        added = load_as_floats(context, builder, signature.args[2], sums, place)
        after = multiply_add(builder, added, builder.extract_value(scale, 0), before)
        address = place_of(context, builder, signature.args[0], total, place)
        builder.store(after, builder.bitcast(address, after.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(total, types.int64, sums, scale), generate


def turned(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers, columns as rows: a step swaps one bit of the row's number with that of the lane's."""
    for bit in (8, 4, 2, 1):
        low = [lane + ROWS - bit if lane & bit else lane for lane in range(ROWS)]
        high = [lane + ROWS if lane & bit else lane + bit for lane in range(ROWS)]
        masks = [ir.Constant(_WORDS, lanes) for lanes in (low, high)]
        for row in (row for row in range(ROWS) if not row & bit):
            pair = rows[row], rows[row | bit]
            rows[row], rows[row | bit] = (builder.shuffle_vector(*pair, mask) for mask in masks)
    return rows


@intrinsic
def store_tile(typing: Any, sums: Any, place: Any, factors: Any, y: Any, m: Any, n: Any) -> Any:
    """y[m + i, n + j] = sums[place + 16 i + j] + bias[n + j] for 16 rows and outputs, rounded to the numbers of y.

    Sums of int32 come output by output, [place + 16 j + i], and are multiplied by x_scales[m + i], then scales[n + j].
    factors: (x_scales, scales, bias), or of sums in fp32 (bias,).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, place, factors, y, m, n = arguments
        kinds = signature.args
        given = list(zip(kinds[2], cgutils.unpack_tuple(builder, factors), strict=True))
        whole = kinds[0].dtype == types.int32
        rows = []
        for row in range(ROWS):
            address = place_of(context, builder, kinds[0], sums, builder.add(place, _LONG(LANES * row)))
            kind = _WORDS if whole else _FLOATS
            rows.append(builder.load(builder.bitcast(address, kind.as_pointer()), align=4))
        if whole:
            rows = [builder.sitofp(words, _FLOATS) for words in turned(builder, rows)]
        bias = load_as_floats(context, builder, *given[-1], n)
        scales = load_as_floats(context, builder, *given[1], n) if whole else None
        for row, numbers in enumerate(rows):
            at = builder.add(m, _LONG(row))
            if whole:
                factor = splat(builder, builder.load(place_of(context, builder, *given[0], at)))
                numbers = builder.fmul(builder.fmul(numbers, factor), scales)
            stored = narrow(builder, kinds[3].dtype, builder.fadd(numbers, bias))
            address = place_of(context, builder, kinds[3], y, at, n)
            builder.store(stored, builder.bitcast(address, stored.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(sums, types.int64, factors, y, types.int64, types.int64), generate


@serial
def multiply_outputs(
    weight: Any, unit: Any, shifts: Any, x_MX: Any, first: Any, tiles: Any, work: Any, y_MN: Any
) -> None:
    """y[first : first + 16 len(tiles)] of the 16 outputs of a unit."""
    words, scales, zeros, shape = weight
    chunk_words, per_group = shape[2], shape[3]
    pairs, sums, total = work
    C = x_MX.shape[1] // (chunk_words * len(shifts))
    step = DEPTH // len(shifts)
    count = ROWS * len(tiles)
    total[: count * LANES] = 0
    clear(tiles)
    for c in range(C):
        group = (unit * (C // per_group) + c // per_group) * LANES
        for j in range(0, chunk_words, step):
            for i in range(step):
                loaded = load_words(words, ((unit * C + c) * chunk_words + j + i) * LANES)
                place = i * len(shifts) // 2 * LANES
                if zeros.shape[0] > 0:
                    store_pairs(loaded, shifts, load_lanes(zeros, group), pairs, place)
                else:
                    store_pairs(loaded, shifts, None, pairs, place)
            multiply(tiles, x_MX, first, (c * chunk_words + j) * len(shifts), pairs)
        if (c + 1) % per_group == 0:
            store_sums(tiles, sums)
            clear(tiles)
            scale = load_lanes(scales, group)
            for m in range(count):
                add_lanes(total, m * LANES, sums, scale)
    for m in range(min(count, y_MN.shape[0] - first)):
        for lane in range(min(LANES, y_MN.shape[1] - unit * LANES)):
            y_MN[first + m, unit * LANES + lane] = total[m * LANES + lane]


@parallel
def multiply_in_tiles(weight: Any, shifts: Any, x_MX: Any, shapes: Any, y_MN: Any) -> None:
    """y = x w^T in fp32; x in bf16, its rows filled up to sixteens, for at most 64 of them at once."""
    words, scales, zeros, shape = weight
    for unit_number in prange((shape[0] + LANES - 1) // LANES):
        weight = (words, scales, zeros, shape)  # threads are not given tuples of tuples
        unit: Any = np.int64(unit_number)
        pairs = aligned(np.empty((ROWS + 1) * LANES, np.int32))
        sums = aligned(np.empty((MOST_ROWS + 1) * LANES, np.float32))
        work = (pairs, sums, np.empty(MOST_ROWS * LANES, np.float32))
        configure(shapes)
        first: Any = np.int64(0)
        while first < x_MX.shape[0]:
            left = x_MX.shape[0] - first
            if left >= 4 * ROWS:
                multiply_outputs(weight, unit, shifts, x_MX, first, (0, 1, 2, 3), work, y_MN)
                first += 4 * ROWS
            elif left >= 2 * ROWS:
                multiply_outputs(weight, unit, shifts, x_MX, first, (0, 1), work, y_MN)
                first += 2 * ROWS
            else:
                multiply_outputs(weight, unit, shifts, x_MX, first, (0,), work, y_MN)
                first += ROWS
        release()
