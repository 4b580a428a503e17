"""Chunks of codes by whole numbers of 22 bits, in the instruction that sums four products of bytes. Imports Numba.

A product of codes with fp32 numbers takes four instructions for 16 of them. Here inputs are whole numbers instead,
those of a chunk with one scale: |v| <= 127 2^14, half a step of which is 2^-22 of the chunk's largest number, as little
as fp32 loses in adding the products up. A whole number is three of int8,

    v = 2^14 a + 2^7 b + c        |a| <= 127, |b|, |c| <= 64

and each of the three sums of products with codes is exact in int32: three instructions for 64 codes (vpdpbusd).

Codes are taken unsigned, u = q + o, o = 2^(bits - 1); that is taken out of the sums as whole numbers, zero points in
fp32:

    y = s s_x (2^14 A + 2^7 B + C) - s z s_x sum v        A = sum u a - o sum a, and B, C likewise

A prepared row is its codes, in fours as a slot takes them and the three parts of a slot side by side, then for every
chunk its factors: s_x, -o times the sums of the three parts, s_x sum v. A slot is 16 words of 4 codes of 8 bits, or the
even or the odd ones of 8 codes of 4 bits.

Shapes: M rows, K inputs, C chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import serial
from trine.kernels.cpu.lanes_loops import LANES, multiply_add, place_of, prefetch, same
from trine.kernels.cpu.memory_loops import floats, words
from trine.kernels.cpu.rounding_loops import chunk_of_row, scale_of_chunk, split_in_3
from trine.kernels.cpu.vector_loops import add_fours, load, splat

PARTS = 3
# The largest whole number, and bytes of a chunk beside its codes.
LIMIT, FACTORS = 127 << 14, 4 * (2 + PARTS)

_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS, _CODES = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES), ir.VectorType(_BYTE, 4 * LANES)


@serial
def row_bytes(num_inputs: int, chunk: int) -> Any:
    """Bytes of a prepared row."""
    chunks = (num_inputs + chunk - 1) // chunk
    return chunks * (PARTS * chunk + FACTORS)


@serial
def round_rows(x: Any, num_inputs: int, chunk: int, bits: int, place: int) -> None:
    """Prepare the rows of x, which follow each other, at a place."""
    chunks = (num_inputs + chunk - 1) // chunk
    part_K = np.empty(chunk, np.float32)
    for m in range(x.shape[0] // num_inputs):
        row = place + m * row_bytes(num_inputs, chunk)
        x_K = x[m * num_inputs : (m + 1) * num_inputs]
        for c in range(chunks):
            source = chunk_of_row(x_K, c * chunk, part_K)
            scale, factor = scale_of_chunk(source, chunk, LIMIT)
            factors = row + chunks * PARTS * chunk + c * FACTORS
            floats(factors, 1)[0] = scale
            split_in_3(source, chunk, factor, bits, row + c * PARTS * chunk, 4 * PARTS, 0, factors + 4)
            sums, total = words(factors + 4, PARTS), np.float32(0)
            for part in range(PARTS):
                total = total * np.float32(128) + np.float32(sums[part])
                sums[part] *= np.int32(-1 << bits - 1)
            floats(factors + 4 + 4 * PARTS, 1)[0] = scale * total


@intrinsic
def add_chunk(
    typing: Any, totals: Any, weights: Any, places: Any, num_words: Any, shifts: Any, x: Any, x_step: Any, factors: Any,
    scales: Any, rows: Any,
) -> Any:  # fmt: skip
    """Add a chunk of some tiles of 16 outputs times each of `rows` rows to totals, fp32 [rows, tiles, 16].

    `weights`: int32, of a tile from one of `places` on. totals, x, factors: addresses, the latter two of the first row;
    the next rows follow after `x_step` bytes. Scales in fp32, one for each lane.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, weights, places, num_words, _, x, x_step, factors, scales, _ = arguments
        count, four = signature.args[9].count, signature.args[4].count == 8
        tiles, slots = cgutils.unpack_tuple(builder, places), 2 if four else 1
        of_rows = [builder.add(factors, builder.mul(x_step, _LONG(m))) for m in range(count)]
        sums = []
        for of_row in of_rows:
            starts = [splat(builder, load(builder, builder.add(of_row, _LONG(4 + 4 * p)), _INT)) for p in range(PARTS)]
            sums.append([[cgutils.alloca_once_value(builder, start) for start in starts] for _ in tiles])
        with cgutils.for_range(builder, num_words) as loop:
            loaded = []
            for tile in tiles:
                at = builder.add(tile, builder.mul(loop.index, _LONG(LANES)))
                address = place_of(context, builder, signature.args[1], weights, at)
                prefetch(builder, address)
                loaded.append(load(builder, builder.ptrtoint(address, _LONG), _WORDS))
            for slot in range(slots):
                codes = []
                for word in loaded:
                    part = builder.and_(builder.lshr(word, same(4 * slot)), same(0x0F0F0F0F)) if four else word
                    unsigned = builder.xor(part, same(0x08080808 if four else -0x7F7F7F80))
                    codes.append(builder.bitcast(unsigned, _CODES))
                number = builder.add(builder.mul(loop.index, _LONG(slots)), _LONG(slot))
                for m in range(count):
                    for part in range(PARTS):
                        offset = builder.add(builder.mul(number, _LONG(4 * PARTS)), _LONG(4 * part))
                        offset = builder.add(offset, builder.mul(x_step, _LONG(m)))
                        fours = splat(builder, load(builder, builder.add(x, offset), _INT))
                        for unsigned, of_tile in zip(codes, sums[m], strict=True):
                            total = builder.load(of_tile[part])
                            added = add_fours(builder, total, unsigned, builder.bitcast(fours, _CODES))
                            builder.store(added, of_tile[part])
        own = [builder.extract_value(scale, 0) for scale in cgutils.unpack_tuple(builder, scales)]
        for m, of_row in enumerate(of_rows):
            scale = splat(builder, load(builder, of_row, _FLOAT))
            for tile, of_tile in enumerate(sums[m]):
                value = None
                for total in of_tile:
                    number = builder.sitofp(builder.load(total), _FLOATS)
                    value = number if value is None else multiply_add(builder, value, _times_128(), number)
                _add(builder, totals, len(tiles) * m + tile, value, builder.fmul(own[tile], scale))
        return context.get_dummy_value()

    places_kinds = (types.int64,) * 3
    return types.void(types.int64, weights, places, types.int64, shifts, *places_kinds, scales, rows), generate


@intrinsic
def take_zeros(typing: Any, totals: Any, factors: Any, x_step: Any, zeros: Any, scales: Any, rows: Any) -> Any:
    """Take the part of the zero points away from `totals`; arguments as of `add_chunk`, zero points as scales."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, factors, x_step, zeros, scales, _ = arguments
        both = zip(*(cgutils.unpack_tuple(builder, part) for part in (zeros, scales)), strict=True)
        parts = [builder.fmul(*(builder.extract_value(part, 0) for part in pair)) for pair in both]
        for m in range(signature.args[5].count):
            place = builder.add(factors, builder.add(builder.mul(x_step, _LONG(m)), _LONG(4 + 4 * PARTS)))
            whole = builder.fsub(ir.Constant(_FLOATS, [-0.0] * LANES), splat(builder, load(builder, place, _FLOAT)))
            for tile, part in enumerate(parts):
                _add(builder, totals, len(parts) * m + tile, whole, part)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, zeros, scales, rows), generate


def _add(builder: Any, totals: Any, index: int, a: Any, b: Any) -> None:
    """totals[index] += a b."""
    place = builder.add(totals, _LONG(4 * LANES * index))
    total = multiply_add(builder, a, b, load(builder, place, _FLOATS))
    builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)


def _times_128() -> Any:
    return ir.Constant(_FLOATS, [128.0] * LANES)
