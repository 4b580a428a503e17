"""Rows of float8 (e4m3) numbers times a weight of float8 codes, both with scales. Imports Numba (see `compiled.py`).

    y[m, n] = sum_g s_x[m, g] s_w[n / spread, g] sum_{k in g} x[m, k] w[n, k]

A group g is a whole row, or 128 numbers of it. Inputs are bf16, which holds float8 numbers exactly. Where a CPU looks
bytes up and multiplies bf16 (AVX512-VBMI, AVX512-BF16), 64 codes become bf16 by two look-ups and two unpackings, and 32
products are one instruction; so inputs lie in the order in which unpacking leaves codes: of 64 the first 8 of every 16,
then the others. Elsewhere codes become fp32, 16 at a time, and inputs are fp32 in their own order. As in
`vector_loops.py`, rows of the weight are read in `STREAMS` far apart at once, and the last 64 inputs end with the row.
Sums are fp32; a row's are added in one order, whichever rows go with it.

Codes are taken for numbers over 2^8 (`float_rows_loops.py`), which scales make up for.

Shapes: M rows, K inputs (64 at least), N outputs, G groups.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.float_rows_loops import HALF_SCALE, decode_lanes, from_e4m3_lanes
from trine.kernels.cpu.lanes_loops import Bfloat, host_has
from trine.kernels.cpu.memory_loops import floats, shorts
from trine.kernels.cpu.quantize import FLOAT8_LIMIT, SMALLEST_SCALE
from trine.kernels.cpu.quantize_loops import round_e4m3, scale_of
from trine.kernels.cpu.vector_loops import (
    AHEAD_BYTES,
    CODE_BLOCK,
    LANES,
    STREAMS,
    block_of_row,
    fetch,
    floats_of,
    load,
    multiply_add,
    splat,
    store_sums,
)

# Inputs of a group where a row has several.
GROUP = 128
_I8, _I16, _I32, _I64, _F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_FLOATS, _CODES = ir.VectorType(_F32, LANES), ir.VectorType(_I8, CODE_BLOCK)
# bf16 numbers of half a block, as their bits and as numbers.
_HALF = CODE_BLOCK // 2
_SHORTS, BFLOATS = ir.VectorType(_I16, _HALF), ir.VectorType(Bfloat(), _HALF)
# Of 64 neighbours, which ones the two unpackings leave in a vector each; and their own order.
_FIRST = [16 * (j // 8) + j % 8 for j in range(_HALF)]
_UNPACKED = (_FIRST, [j + 8 for j in _FIRST])
_OWN = (list(range(_HALF)), list(range(_HALF, CODE_BLOCK)))
# Whether bf16 is multiplied; bytes of an input then, codes that are decoded together, and rows of inputs that meet
# them (more would not fit the registers, beside the tables).
DOTS = host_has("avx512bf16") and host_has("avx512vbmi")
INPUT_BYTES, _TOGETHER, SEVERAL = (2, CODE_BLOCK, 2) if DOTS else (4, LANES, 4)


def _bits(code: int, power: int) -> int:
    """bf16 of a positive code times 2^power."""
    exponent, fraction = code >> 3, code & 7
    number = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return int(struct.unpack("<I", struct.pack("<f", number * 2.0**power))[0] >> 16)


def _look_up(builder: Any, address: Any, orders: tuple[list[int], list[int]], power: int) -> list[Any]:
    """64 codes times 2^power as two vectors of 32 bf16, each of the codes that its order names."""
    codes = load(builder, address, _CODES)
    kind = ir.FunctionType(_CODES, [_CODES] * 3)
    look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")
    bits = [_bits(code, power) for code in range(2 * CODE_BLOCK)]
    bytes_of = []
    for shift in (0, 8):
        table = [number >> shift & 255 for number in bits]
        halves = [ir.Constant(_CODES, part) for part in (table[:CODE_BLOCK], table[CODE_BLOCK:])]
        bytes_of.append(builder.call(look_up, [halves[0], codes, halves[1]]))  # by seven bits of each code
    low, high = bytes_of
    high = builder.or_(high, builder.and_(codes, ir.Constant(_CODES, [-128] * CODE_BLOCK)))
    found = []
    for order in orders:
        mask = [place + half * CODE_BLOCK for place in order for half in (0, 1)]
        both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, CODE_BLOCK), mask))
        found.append(builder.bitcast(both, BFLOATS))
    return found


def _numbers(builder: Any, address: Any) -> list[Any]:
    """`_TOGETHER` codes over 2^8: two vectors of 32 bf16, or one of 16 fp32."""
    return _look_up(builder, address, _UNPACKED, -8) if DOTS else [from_e4m3_lanes(builder, address)]


def _inputs(builder: Any, address: Any) -> list[Any]:
    """As many inputs as `lay_block` leaves them."""
    kind, size = (BFLOATS, _HALF) if DOTS else (_FLOATS, LANES)
    return [load(builder, builder.add(address, _I64(at * INPUT_BYTES)), kind) for at in range(0, _TOGETHER, size)]


def add_products(builder: Any, total: Any, inputs: Any, numbers: Any) -> Any:
    """total[i] + inputs[2 i] numbers[2 i] + inputs[2 i + 1] numbers[2 i + 1]: bf16 in fp32."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, BFLOATS, BFLOATS])
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(dot, [total, inputs, numbers])


def _add(builder: Any, total: Any, numbers: list[Any], inputs: list[Any]) -> Any:
    """The total with the products of such numbers."""
    for number, given in zip(numbers, inputs, strict=True):
        total = add_products(builder, total, given, number) if DOTS else multiply_add(builder, number, given, total)
    return total


def _keep(builder: Any, vector: Any, address: Any, at: int) -> None:
    place = builder.inttoptr(builder.add(address, _I64(at)), vector.type.as_pointer())
    builder.store(vector, place).align = 2


@intrinsic
def lay_block(typing: Any, numbers: Any, place: Any) -> Any:
    """64 bf16 numbers at an address as products read them, to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, place = arguments
        if DOTS:
            halves = [load(builder, builder.add(numbers, _I64(at)), _SHORTS) for at in (0, CODE_BLOCK)]
            for i, order in enumerate(_UNPACKED):
                laid = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, _HALF), order))
                _keep(builder, laid, place, i * CODE_BLOCK)
        else:
            for at in range(0, CODE_BLOCK, LANES):
                _keep(builder, floats_of(builder, builder.add(numbers, _I64(2 * at)), _I16), place, 4 * at)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@serial
def laid_bytes(num_inputs: int) -> Any:
    """Bytes of a row of inputs as `lay_row` leaves it."""
    return (num_inputs + CODE_BLOCK - 1) // CODE_BLOCK * CODE_BLOCK * INPUT_BYTES


@serial
def lay_part(numbers_S: Any, place: int) -> None:
    """`lay_block` of an array, which is kept until then (its address alone would not keep it)."""
    lay_block(numbers_S.ctypes.data, place)


@serial
def lay_row(numbers: int, num_inputs: int, place: int) -> None:
    """A row of bf16 numbers in whole blocks, of which the last ends with the row, with zeros before; by address."""
    whole = num_inputs // CODE_BLOCK * CODE_BLOCK
    for first in range(0, whole, CODE_BLOCK):
        lay_block(numbers + 2 * first, place + first * INPUT_BYTES)
    if whole < num_inputs:
        last_S = np.zeros(CODE_BLOCK, np.uint16)
        from_S = shorts(numbers + 2 * (num_inputs - CODE_BLOCK), CODE_BLOCK)
        for j in range(CODE_BLOCK - num_inputs + whole, CODE_BLOCK):
            last_S[j] = from_S[j]
        lay_part(last_S, place + whole * INPUT_BYTES)


@serial
def round_float8(x: int, num_rows: int, num_inputs: int, groups: int, place: int) -> None:
    """Rows of fp32 at x as float8 numbers, each laid out at a place, and behind all of them their scales [M, G]."""
    step, size = laid_bytes(num_inputs), num_inputs if groups == 1 else GROUP
    numbers_K = np.empty(num_inputs, np.uint16)
    scales = floats(place + num_rows * step, num_rows * groups)
    for m in range(num_rows):
        x_K = floats(x + 4 * m * num_inputs, num_inputs)
        for g in range(groups):
            begin, end = g * size, min(num_inputs, (g + 1) * size)
            scale = scale_of(x_K[begin:end], FLOAT8_LIMIT, SMALLEST_SCALE)
            round_e4m3(x_K[begin:end], scale, FLOAT8_LIMIT, numbers_K[begin:end])
            scales[m * groups + g] = scale
        lay_row(numbers_K.ctypes.data, num_inputs, place + m * step)


def _rows(count: int) -> Any:
    """The intrinsic for `count` rows of inputs: `STREAMS` rows of the weight, `step` bytes from each other.

    (row, step, K, scales of all rows, number of the first, distance of numbers, spread, groups, blocks of a group, x,
    x_step, factors, y, y_step, y_next): inputs lie at x, `x_step` bytes from each other, their scales at `factors`;
    sums at y, those of one input `y_step` bytes apart, the next one's `y_next` bytes on.
    """

    def declare(
        typing: Any, row: Any, step: Any, num_inputs: Any, scales: Any, first: Any, apart: Any, spread: Any,
        groups: Any, size: Any, x: Any, x_step: Any, factors: Any, y: Any, y_step: Any, y_next: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (
                row, step, num_inputs, scales, first, apart, spread, groups, size, x, x_step, factors, y, y_step,
                y_next,
            ) = arguments  # fmt: skip

            def places(begin: Any, distance: Any, number: int) -> list[Any]:
                return [builder.add(begin, builder.mul(_I64(i), distance)) for i in range(number)]

            rows, inputs, line_bytes = (
                places(row, step, STREAMS),
                places(x, x_step, count),
                builder.mul(groups, _I64(4)),
            )
            lines = [builder.sdiv(number, spread) for number in places(first, apart, STREAMS)]
            of_rows = [builder.add(scales, builder.mul(line, line_bytes)) for line in lines]
            of_inputs, zero = places(factors, line_bytes, count), ir.Constant(_FLOATS, None)
            totals = [[cgutils.alloca_once_value(builder, zero) for _ in rows] for _ in inputs]
            parts = [[cgutils.alloca_once(builder, _FLOATS) for _ in rows] for _ in inputs]
            blocks = builder.sdiv(builder.add(num_inputs, _I64(CODE_BLOCK - 1)), _I64(CODE_BLOCK))
            with cgutils.for_range(builder, groups) as group:
                begin = builder.mul(group.index, size)
                left = builder.sub(blocks, begin)
                number = builder.select(builder.icmp_signed("<", left, size), left, size)
                for part in (part for of_input in parts for part in of_input):
                    builder.store(zero, part)
                with cgutils.for_range(builder, number) as loop:
                    block = builder.add(begin, loop.index)
                    offset = block_of_row(builder, block, CODE_BLOCK, num_inputs)
                    x_offset = builder.mul(block, _I64(CODE_BLOCK * INPUT_BYTES))
                    for at in range(0, CODE_BLOCK, _TOGETHER):
                        own = builder.add(x_offset, _I64(at * INPUT_BYTES))
                        given = [_inputs(builder, builder.add(place, own)) for place in inputs]
                        for s, place in enumerate(rows):
                            address = builder.add(place, offset)
                            if at == 0:
                                fetch(builder, address, _I64(AHEAD_BYTES))
                            numbers = _numbers(builder, builder.add(address, _I64(at)))
                            for m in range(count):
                                total = _add(builder, builder.load(parts[m][s]), numbers, given[m])
                                builder.store(total, parts[m][s])
                at_group = builder.mul(group.index, _I64(4))
                factors_of_rows = [load(builder, builder.add(place, at_group), _F32) for place in of_rows]
                for m, place in enumerate(of_inputs):
                    factor = load(builder, builder.add(place, at_group), _F32)
                    for s in range(STREAMS):
                        scale = splat(builder, builder.fmul(factors_of_rows[s], factor))
                        total = multiply_add(builder, builder.load(parts[m][s]), scale, builder.load(totals[m][s]))
                        builder.store(total, totals[m][s])
            for m, to in enumerate(places(y, y_next, count)):
                store_sums(builder, totals[m], to, y_step)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 15), generate

    return intrinsic(declare)


_one_row, _several_rows = _rows(1), _rows(SEVERAL)


@serial
def sum_float8(weight: Any, x: int, factors: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """The sums of outputs `begin` to `end` in fp32, of laid rows and their scales; rows of y `y_step` bytes apart.

    weight: (codes, K, scales [lines, G], G, outputs of a line), by address. Outputs lie in `STREAMS` ranges of one
    length, at equal distances: they overlap where rows are left over.
    """
    codes, K, scales, groups, spread = weight
    apart, x_step, size = (end - begin) // STREAMS, laid_bytes(K), GROUP // CODE_BLOCK if groups > 1 else K
    for n in range(begin, end - apart * (STREAMS - 1)):
        row, m = codes + n * K, 0
        while m < num_rows:
            at, own, to = x + m * x_step, factors + 4 * m * groups, y + m * y_step + 4 * n
            if num_rows - m >= SEVERAL:
                _several_rows(
                    row, apart * K, K, scales, n, apart, spread, groups, size, at, x_step, own, to, 4 * apart, y_step
                )
                m += SEVERAL
            else:
                _one_row(
                    row, apart * K, K, scales, n, apart, spread, groups, size, at, x_step, own, to, 4 * apart, y_step
                )
                m += 1


@parallel
def multiply_float8(codes_NK: Any, scales: Any, spread: int, x_MK: Any, factors_MG: Any, size: int, y_MN: Any) -> None:
    """y in fp32 of rows in bf16, codes in uint8 that are not NaN, and their scales, those of codes [lines, G].

    `size`: outputs of a piece of work.
    """
    (M, K), N, step = x_MK.shape, codes_NK.shape[0], laid_bytes(x_MK.shape[1])
    laid = np.empty(M * step, np.uint8)
    for m in range(M):
        lay_row(x_MK.ctypes.data + 2 * m * K, K, laid.ctypes.data + m * step)
    for piece in prange((N + size - 1) // size):
        weight = (codes_NK.ctypes.data, K, scales.ctypes.data, scales.shape[1], spread)
        first, last = piece * size, min(N, (piece + 1) * size)
        sum_float8(weight, laid.ctypes.data, factors_MG.ctypes.data, M, first, last, y_MN.ctypes.data, 4 * N)
        for m in range(M):
            for n in range(first, last):
                y_MN[m, n] *= HALF_SCALE


@intrinsic
def decode_block(typing: Any, codes: Any, scale: Any, scaled: Any, numbers: Any) -> Any:
    """The numbers in bf16 of 64 codes at an address to another; where `scaled`, times a scale, rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scale, scaled, numbers = arguments
        found = _look_up(builder, codes, _OWN, 0)
        wide, words = ir.VectorType(_F32, _HALF), ir.VectorType(_I32, _HALF)
        with builder.if_else(builder.icmp_signed("!=", scaled, _I64(0))) as (then, otherwise):
            with then:
                one = builder.insert_element(ir.Constant(wide, ir.Undefined), scale, _I32(0))
                factor = builder.shuffle_vector(one, ir.Constant(wide, ir.Undefined), ir.Constant(words, [0] * _HALF))
                for i, number in enumerate(found):
                    bits = builder.shl(
                        builder.zext(builder.bitcast(number, _SHORTS), words), ir.Constant(words, [16] * _HALF)
                    )
                    rounded = builder.fptrunc(builder.fmul(builder.bitcast(bits, wide), factor), BFLOATS)
                    _keep(builder, rounded, numbers, i * CODE_BLOCK)
            with otherwise:
                for i, number in enumerate(found):
                    _keep(builder, number, numbers, i * CODE_BLOCK)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), generate


@serial
def decode_together(codes: int, numbers: int, place: int, scale: Any, scaled: bool) -> None:
    """Those codes of a row that are decoded together, from a place on."""
    if DOTS:
        decode_block(codes + place, scale, np.int64(scaled), numbers + 2 * place)
    else:
        decode_lanes(codes + place, scale * HALF_SCALE, numbers + 2 * place)


@parallel
def decode_e4m3(codes_NK: Any, scales: Any, first: int, spread: int, numbers_NK: Any) -> None:
    """Numbers in bf16 of codes in uint8 that are not NaN; times scales [lines, G], where there are any, of which output
    n has line (first + n) / spread.

    The last codes of a row may overlap those before, which another scale may belong to: so they come first.
    """
    N, K = codes_NK.shape
    scaled = scales.shape[0] > 0
    size, whole = GROUP if scaled else K, K // _TOGETHER * _TOGETHER
    for n in prange(N):
        codes, numbers = codes_NK.ctypes.data + n * K, numbers_NK.ctypes.data + 2 * n * K
        line, last = (first + n) // spread, (K - 1) // size
        if whole < K:
            decode_together(codes, numbers, K - _TOGETHER, scales[line, last] if scaled else np.float32(1), scaled)
        for g in range(last + 1):
            scale = scales[line, g] if scaled else np.float32(1)
            for place in range(g * size, min(whole, (g + 1) * size), _TOGETHER):
                decode_together(codes, numbers, place, scale, scaled)
