"""Inputs rounded to whole numbers, 16 at a time, for products with codes. Imports Numba (see `compiled.py`).

    a chunk   of 32 to 128 numbers: v = round(x / s), |v| <= 127 128^(parts - 1), s from the largest; v as `parts` int8,
              the highest first: v = 128^(parts - 1) a + ... + 128 b + c with |b|, |c| <= 64
    a block   of 64: int8 codes with one scale, and the sums of their fours

Where a number is none, or infinite, the scale is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import serial
from trine.kernels.cpu.lanes_loops import LANES, same
from trine.kernels.cpu.numbers_loops import from_bits
from trine.kernels.cpu.vector_loops import CODE_BLOCK, add_fours, load, shuffle, splat

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_WORDS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
_CODES, _BYTES, _FOURS = ir.VectorType(_BYTE, CODE_BLOCK), ir.VectorType(_BYTE, LANES), ir.VectorType(_INT, LANES // 4)


@intrinsic
def largest_bits(typing: Any, x: Any, count: Any) -> Any:
    """The largest of `count` fp32 numbers (of which 16 are a step) without their signs, as the bits that it has.

    These are in the same order, and what is no finite number is larger than all others.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, count = arguments
        largest = cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None))
        with cgutils.for_range(builder, builder.udiv(count, _LONG(LANES))) as loop:
            place = builder.add(x, builder.mul(loop.index, _LONG(4 * LANES)))
            bits, before = builder.and_(load(builder, place, _WORDS), same(0x7FFFFFFF)), builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", bits, before), bits, before), largest)
        return _reduce(builder, "umax", builder.load(largest))

    return types.uint32(types.int64, types.int64), generate


def _reduce(builder: Any, how: str, vector: Any) -> Any:
    signature = ir.FunctionType(_INT, [_WORDS])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.vector.reduce.{how}.v{LANES}i32")
    return builder.call(function, [vector])


def _nearest(builder: Any, numbers: Any) -> Any:
    """fp32 as the nearest int32, ties to even."""
    signature = ir.FunctionType(_FLOATS, [_FLOATS])
    rint = cgutils.get_or_insert_function(builder.module, signature, f"llvm.rint.v{LANES}f32")
    return builder.fptosi(builder.call(rint, [numbers]), _WORDS)


def _splitter(parts: int) -> Any:
    """The intrinsic that rounds a chunk to whole numbers and writes each as `parts` codes, the highest first."""

    def declare(
        typing: Any, x: Any, chunk: Any, factor: Any, bits: Any, place: Any, slot_step: Any, flip: Any, sums: Any
    ) -> Any:
        """Codes of fours of x factor (fp32), 4 bytes a part, a slot `slot_step` bytes after the other; their sums.

        What is written is changed in the bits of `flip`, those of four codes.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, chunk, factor, bits, place, slot_step, flip, sums = arguments
            flips = shuffle(builder, splat(builder, builder.trunc(flip, _INT)), [0] * (LANES // 4))
            factors, four = splat(builder, factor), builder.icmp_signed("==", bits, _LONG(4))
            totals = [cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None)) for _ in range(parts)]
            with cgutils.for_range(builder, builder.udiv(chunk, _LONG(LANES))) as loop:
                at = builder.add(x, builder.mul(loop.index, _LONG(4 * LANES)))
                left = _nearest(builder, builder.fmul(load(builder, at, _FLOATS), factors))
                # Of a word of 8 codes the even ones are a slot, the odd ones another.
                order = [first + 2 * i + odd for first in (0, 8) for odd in (0, 1) for i in range(4)]
                mixed = builder.shuffle_vector(left, left, ir.Constant(_WORDS, order))
                left = builder.select(four, mixed, left)
                slot = builder.add(place, builder.mul(builder.mul(loop.index, _LONG(4)), slot_step))
                fours = []
                for part in range(parts):
                    shift, code = 7 * (parts - 1 - part), left
                    if shift:
                        code = builder.ashr(builder.add(left, same(1 << shift - 1)), same(shift))
                        left = builder.sub(left, builder.shl(code, same(shift)))
                    builder.store(builder.add(builder.load(totals[part]), code), totals[part])
                    narrow = builder.trunc(code, _BYTES)
                    fours.append(builder.xor(builder.bitcast(narrow, _FOURS), flips))
                for i in range(LANES // 4):
                    to = builder.add(slot, builder.mul(slot_step, _LONG(i)))
                    for part in range(0, parts, 2):  # two parts of a slot at once
                        pair = fours[part], fours[min(part + 1, parts - 1)]
                        lanes = [i, i + LANES // 4][: parts - part]
                        mask = ir.Constant(ir.VectorType(_INT, len(lanes)), lanes)
                        stored = builder.shuffle_vector(*pair, mask)
                        at = builder.add(to, _LONG(4 * part))
                        builder.store(stored, builder.inttoptr(at, stored.type.as_pointer()), align=1)
            for part, total in enumerate(totals):
                to = builder.inttoptr(builder.add(sums, _LONG(4 * part)), _INT.as_pointer())
                builder.store(_reduce(builder, "add", builder.load(total)), to, align=4)
            return context.get_dummy_value()

        kinds = (types.int64, types.int64, types.float32, *(types.int64,) * 5)
        return types.void(*kinds), generate

    return intrinsic(declare)


split_in_2, split_in_3, split_in_4 = _splitter(2), _splitter(3), _splitter(4)


@serial
def scale_of_chunk(x: int, chunk: int, limit: int) -> Any:
    """(scale, what numbers are multiplied with) for whole numbers up to a limit; the scale of what has NaN is NaN."""
    bits = largest_bits(x, chunk)
    if bits >= np.uint32(0x7F800000):
        return np.float32(np.nan), np.float32(0)
    largest = from_bits(bits)
    return largest / np.float32(limit), np.float32(limit) / largest if largest > 0 else np.float32(0)


@serial
def chunk_of_row(x_K: Any, first: int, part_K: Any) -> Any:
    """The address of the inputs from `first` on; of the last ones of a row, which do not fill a chunk, in `part_K`."""
    chunk = part_K.shape[0]
    if first + chunk <= x_K.shape[0]:
        return x_K.ctypes.data + 4 * first
    for j in range(chunk):
        part_K[j] = x_K[first + j] if first + j < x_K.shape[0] else np.float32(0)
    return part_K.ctypes.data


@intrinsic
def codes_of_block(typing: Any, x: Any, factor: Any, codes: Any, sums: Any) -> Any:
    """The 64 numbers at x times a factor as int8 to `codes`, the sums of their fours, int32 [16], to `sums`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, factor, codes, sums = arguments
        factors = splat(builder, factor)
        for i in range(0, CODE_BLOCK, LANES):
            numbers = load(builder, builder.add(x, _LONG(4 * i)), _FLOATS)
            narrow = builder.trunc(_nearest(builder, builder.fmul(numbers, factors)), _BYTES)
            place = builder.inttoptr(builder.add(codes, _LONG(i)), _BYTES.as_pointer())
            builder.store(narrow, place, align=1)
        ones = ir.Constant(_CODES, [1] * CODE_BLOCK)
        fours = add_fours(builder, ir.Constant(_WORDS, None), ones, load(builder, codes, _CODES))
        builder.store(fours, builder.inttoptr(sums, _WORDS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), generate


@serial
def round_block(x: int, codes: int, sums: int) -> Any:
    """Codes and their sums of the block at x; its scale, 1 of zeros."""
    bits = largest_bits(x, CODE_BLOCK)
    largest, scale = from_bits(bits), np.float32(1)
    if bits >= np.uint32(0x7F800000):
        scale = np.float32(np.nan)
    elif largest > 0:
        scale = largest / np.float32(127)
    codes_of_block(x, np.float32(1) / scale, codes, sums)
    return scale
