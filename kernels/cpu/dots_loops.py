"""Chunks of codes by whole numbers of 22 bits, in the instruction that sums four products of bytes. Imports Numba.

A product of codes with fp32 numbers takes four instructions for 16 of them. Here inputs are whole numbers instead,
those of a chunk with one scale: |v| <= 127 2^14, half a step of which is 2^-22 of the chunk's largest number, as little
as fp32 loses in adding the products up. A whole number is three of int8,

    v = 2^14 a + 2^7 b + c        |a| <= 127, |b|, |c| <= 64

and each of the three sums of products with codes is exact in int32: three instructions for 64 codes (vpdpbusd).

Codes are taken unsigned, u = q + 2^(bits - 1); the origin, 2^(bits - 1) + z, is taken out of the sums as whole numbers:

    y = s s_x (2^14 A + 2^7 B + C)        A = sum u a - (2^(bits - 1) + z) sum a, and B, C likewise

A prepared row is its codes, in fours as a slot takes them and the three parts of a slot side by side, then for every
chunk its scale and the sums of the three parts. A slot is 16 words of 4 codes of 8 bits, or the even or the odd ones of
8 codes of 4 bits.

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
from trine.kernels.cpu.memory_loops import bytes_at, floats, words
from trine.kernels.cpu.vector_loops import add_fours, load, splat

PARTS = 3
# The largest whole number, and bytes of a chunk beside its codes.
LIMIT, FACTORS = 127 << 14, 4 * (1 + PARTS)

_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS, _CODES = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES), ir.VectorType(_BYTE, 4 * LANES)


@serial
def row_bytes(num_inputs: int, chunk: int) -> Any:
    """Bytes of a prepared row."""
    chunks = (num_inputs + chunk - 1) // chunk
    return chunks * (PARTS * chunk + FACTORS)


@serial
def place_in_chunk(slot: int, i: int, bits: int) -> Any:
    """The input that number i of a slot meets."""
    return 8 * (slot // 2) + 2 * i + slot % 2 if bits == 4 else 4 * slot + i


@serial
def round_chunk(x_K: Any, first: int, chunk: int, bits: int, codes: Any, sums: Any) -> Any:
    """The codes of a chunk of inputs from `first` on, 0 beyond the row, and their sums; its scale, NaN where one is."""
    largest, poison = np.float32(0), np.float32(0)
    last = min(first + chunk, x_K.shape[0])
    for k in range(first, last):
        largest = max(largest, abs(x_K[k]))
        poison += x_K[k] * np.float32(0)  # NaN of NaN and of infinity
    factor = np.float32(LIMIT) / largest if largest > 0 else np.float32(0)
    if poison != poison:
        factor = np.float32(0)
    sums[:] = 0
    for slot in range(chunk // 4):
        for i in range(4):
            k = first + place_in_chunk(slot, i, bits)
            v = np.int32(np.rint(x_K[k] * factor)) if k < last else np.int32(0)
            a = (v + np.int32(1 << 13)) >> np.int32(14)
            v -= a << np.int32(14)
            b = (v + np.int32(1 << 6)) >> np.int32(7)
            v -= b << np.int32(7)
            at = 4 * PARTS * slot + i
            codes[at], codes[at + 4], codes[at + 8] = np.int8(a), np.int8(b), np.int8(v)
            sums[0] += np.int32(a)
            sums[1] += np.int32(b)
            sums[2] += np.int32(v)
    return largest / np.float32(LIMIT) + poison


@serial
def round_rows(x: Any, num_inputs: int, chunk: int, bits: int, place: int) -> None:
    """Prepare the rows of x, which follow each other, at a place."""
    chunks = (num_inputs + chunk - 1) // chunk
    for m in range(x.shape[0] // num_inputs):
        row = place + m * row_bytes(num_inputs, chunk)
        for c in range(chunks):
            codes = bytes_at(row + c * PARTS * chunk, PARTS * chunk)
            factors = row + chunks * PARTS * chunk + c * FACTORS
            x_K = x[m * num_inputs : (m + 1) * num_inputs]
            floats(factors, 1)[0] = round_chunk(x_K, c * chunk, chunk, bits, codes, words(factors + 4, PARTS))


@intrinsic
def add_chunk(
    typing: Any, totals: Any, weights: Any, place: Any, num_words: Any, shifts: Any, x: Any, x_step: Any, factors: Any,
    zeros: Any, scale: Any, rows: Any,
) -> Any:  # fmt: skip
    """totals + a chunk of 16 outputs times each of `rows` rows; two slots at a time, whose sums are kept apart.

    `weights`: int32, from `place` on. x, factors: of the first row; the next rows follow after `x_step` bytes. Zero
    points and scales in fp32, one for each lane.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, weights, place, num_words, _, x, x_step, factors, zeros, scale, _ = arguments
        count, four = signature.args[10].count, signature.args[4].count == 8
        sums = [
            [[cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None)) for _ in range(PARTS)] for _ in range(2)]
            for _ in range(count)
        ]
        step = 1 if four else 2
        with cgutils.for_range(builder, builder.sdiv(num_words, _LONG(step))) as loop:
            loaded = []
            for word in range(step):
                index = builder.add(builder.mul(loop.index, _LONG(step)), _LONG(word))
                at = builder.add(place, builder.mul(index, _LONG(LANES)))
                address = place_of(context, builder, signature.args[1], weights, at)
                prefetch(builder, address)
                loaded.append(load(builder, builder.ptrtoint(address, _LONG), _WORDS))
            for slot in range(2):
                word = loaded[0] if four else loaded[slot]
                if four:
                    word = builder.and_(builder.lshr(word, same(4 * slot)), same(0x0F0F0F0F))
                unsigned = builder.xor(word, same(0x08080808 if four else -0x7F7F7F80))
                for m in range(count):
                    for part in range(PARTS):
                        number = builder.add(builder.mul(loop.index, _LONG(2)), _LONG(slot))
                        offset = builder.add(builder.mul(number, _LONG(4 * PARTS)), _LONG(4 * part))
                        offset = builder.add(offset, builder.mul(x_step, _LONG(m)))
                        fours = splat(builder, load(builder, builder.add(x, offset), _INT))
                        place_of_sum = sums[m][slot][part]
                        total = add_fours(
                            builder,
                            builder.load(place_of_sum),
                            builder.bitcast(unsigned, _CODES),
                            builder.bitcast(fours, _CODES),
                        )
                        builder.store(total, place_of_sum)
        origin = builder.fptosi(builder.extract_value(zeros, 0), _WORDS)
        origin = builder.add(origin, same(8 if four else 128))
        for m in range(count):
            at = builder.add(factors, builder.mul(x_step, _LONG(m)))
            value = None
            for part in range(PARTS):
                of_inputs = load(builder, builder.add(at, _LONG(4 * (1 + part))), _INT)
                both = builder.add(*(builder.load(sums[m][slot][part]) for slot in range(2)))
                exact = builder.sub(both, builder.mul(origin, splat(builder, of_inputs)))
                number = builder.sitofp(exact, _FLOATS)
                value = number if value is None else multiply_add(builder, value, _times_128(), number)
            factor = builder.fmul(builder.extract_value(scale, 0), splat(builder, load(builder, at, _FLOAT)))
            total = multiply_add(builder, value, factor, builder.extract_value(totals, m))
            totals = builder.insert_value(totals, total, m)
        return totals

    arguments = (totals, weights, types.int64, types.int64, shifts, *(types.int64,) * 3, zeros, scale, rows)
    return totals(*arguments), generate


def _times_128() -> Any:
    return ir.Constant(_FLOATS, [128.0] * LANES)
