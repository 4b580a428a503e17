"""Many rows of float8 (e4m3) numbers times a weight of float8 codes, both with scales. Imports Numba.

The formula is that of `float8_loops.py`, and nothing is rounded but the result. `PANEL` outputs of the weight become
bf16 in the cache, once for all rows. A vector holds 16 rows: every lane adds its row's products with a pair of numbers
of an output in one instruction (AVX512-BF16), so that no vector has to be summed up. For that rows of x are turned over
once, [vectors, pairs of inputs, 16 rows, 2], and results on their way out.

After `RUN` inputs, or a group, sums are added with their scales to those in the cache: a tile of 24 vectors of sums, of
one, two or four vectors of rows, is all that registers hold beside what it meets.

Shapes: M rows, K inputs (64 at least, an even number), N outputs (`PANEL` at least), G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.float8_loops import BFLOATS, GROUP, add_products, decode_block
from trine.kernels.cpu.lanes_loops import narrow
from trine.kernels.cpu.memory_loops import floats
from trine.kernels.cpu.vector_loops import CODE_BLOCK, LANES, load, multiply_add, splat

PANEL, RUN, _SUMS, _VECTORS = 48, 256, 24, 4
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
# Bytes of a vector, and of a pair of inputs.
_VECTOR, _PAIR = 64, 4


def _tile(vectors: int) -> Any:
    """The intrinsic that adds to `_SUMS` vectors at t, those of an output `t_step` bytes apart, `pairs` of inputs.

    (w, w_step, pairs, x, x_step, scales, factors, factors_step, t, t_step): outputs lie at w, vectors of rows at x, the
    scale of each output at scales, those of each vector of rows at factors.
    """
    outputs = _SUMS // vectors

    def declare(
        typing: Any, w: Any, w_step: Any, pairs: Any, x: Any, x_step: Any, scales: Any, factors: Any,
        factors_step: Any, t: Any, t_step: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, w_step, pairs, x, x_step, scales, factors, factors_step, t, t_step = arguments

            def places(begin: Any, distance: Any, number: int) -> list[Any]:
                return [builder.add(begin, builder.mul(_I64(i), distance)) for i in range(number)]

            rows, columns, zero = places(x, x_step, vectors), places(w, w_step, outputs), ir.Constant(_FLOATS, None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in rows] for _ in columns]
            with cgutils.for_range(builder, pairs) as loop:
                at, pair = builder.mul(loop.index, _I64(_VECTOR)), builder.mul(loop.index, _I64(_PAIR))
                given = [load(builder, builder.add(row, at), BFLOATS) for row in rows]
                for column, of_column in zip(columns, sums, strict=True):
                    both = splat(builder, load(builder, builder.add(column, pair), _I32))
                    numbers = builder.bitcast(both, BFLOATS)
                    for inputs, place in zip(given, of_column, strict=True):
                        builder.store(add_products(builder, builder.load(place), inputs, numbers), place)
            of_rows = [load(builder, place, _FLOATS) for place in places(factors, factors_step, vectors)]
            for o, of_column in enumerate(sums):
                scale = splat(builder, load(builder, builder.add(scales, _I64(4 * o)), _F32))
                for v, place in enumerate(of_column):
                    to = builder.add(builder.add(t, builder.mul(_I64(o), t_step)), _I64(_VECTOR * v))
                    total = multiply_add(
                        builder, builder.load(place), builder.fmul(scale, of_rows[v]), load(builder, to, _FLOATS)
                    )
                    builder.store(total, builder.inttoptr(to, _FLOATS.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 10), generate

    return intrinsic(declare)


_tile_1, _tile_2, _tile_4 = _tile(1), _tile(2), _tile(4)


def _turn(builder: Any, vectors: list[Any]) -> list[Any]:
    """16 vectors of the first, the second ... numbers of 16 vectors."""
    apart = LANES // 2
    while apart:
        order = [i for begin in range(0, LANES, 2 * apart) for i in range(begin, begin + apart)]
        low = [i if i % (2 * apart) < apart else i - apart + LANES for i in range(LANES)]
        high = [i + apart if i % (2 * apart) < apart else i + LANES for i in range(LANES)]
        turned = list(vectors)
        for i in order:
            for place, mask in ((i, low), (i + apart, high)):
                lanes = ir.Constant(ir.VectorType(_I32, LANES), mask)
                turned[place] = builder.shuffle_vector(vectors[i], vectors[i + apart], lanes)
        vectors, apart = turned, apart // 2
    return vectors


@intrinsic
def turn_inputs(typing: Any, x: Any, x_step: Any, last: Any, to: Any) -> Any:
    """16 pairs of inputs of 16 rows, `x_step` bytes apart, to 16 vectors; row `last` for those behind it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, x_step, last, to = arguments
        rows = [builder.select(builder.icmp_signed("<", _I64(i), last), _I64(i), last) for i in range(LANES)]
        given = [load(builder, builder.add(x, builder.mul(row, x_step)), _FLOATS) for row in rows]
        for i, vector in enumerate(_turn(builder, given)):
            place = builder.inttoptr(builder.add(to, _I64(_VECTOR * i)), _FLOATS.as_pointer())
            builder.store(vector, place).align = 4
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate


@intrinsic
def store_results(typing: Any, t: Any, t_step: Any, bias: Any, y: Any, y_step: Any, count: Any, half: Any) -> Any:
    """16 sums of outputs, `t_step` bytes apart, of `count` rows plus 16 biases (where bias is not 0), to rows of y.

    Those are `y_step` bytes apart, in bf16 (`half`) or fp32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        t, t_step, bias, y, y_step, count, half = arguments
        vectors = [load(builder, builder.add(t, builder.mul(_I64(i), t_step)), _FLOATS) for i in range(LANES)]
        added = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None))
        with builder.if_then(builder.icmp_signed("!=", bias, _I64(0))):
            builder.store(load(builder, bias, _FLOATS), added)
        biases, is_half = builder.load(added), builder.icmp_signed("!=", half, _I64(0))
        for m, vector in enumerate(_turn(builder, vectors)):
            with builder.if_then(builder.icmp_signed("<", _I64(m), count)):
                total, place = builder.fadd(vector, biases), builder.add(y, builder.mul(_I64(m), y_step))
                with builder.if_else(is_half) as (then, otherwise):
                    with then:
                        short = narrow(builder, types.uint16, total)
                        builder.store(short, builder.inttoptr(place, short.type.as_pointer())).align = 2
                    with otherwise:
                        builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 7), generate


@serial
def line_of(buffer: Any) -> Any:
    """The first address in a buffer where a line of the cache begins; it has 64 bytes more.

    Functions get buffers as arrays: an address does not keep the memory.
    """
    return (buffer.ctypes.data + 63) // 64 * 64


@serial
def decode_panel(weight: Any, begin: int, decoded: Any, w_step: int, scales_GP: Any) -> None:
    """`PANEL` outputs as bf16, and their scales, group by group."""
    (codes, K, scales, groups, spread), w = weight, line_of(decoded)
    for o in range(PANEL):
        row, to = codes + (begin + o) * K, w + o * w_step
        decode_block(row + K - CODE_BLOCK, np.float32(1), 0, to + 2 * (K - CODE_BLOCK))
        for k in range(0, K - CODE_BLOCK, CODE_BLOCK):
            decode_block(row + k, np.float32(1), 0, to + 2 * k)
        line_G = floats(scales + 4 * ((begin + o) // spread) * groups, groups)
        for g in range(groups):
            scales_GP[g, o] = line_G[g]


@serial
def add_run(
    vectors: int, decoded: Any, w_step: int, turned: Any, x_step: int, first: int, pairs: int, scales_P: Any,
    factors: Any, sums: Any,
) -> None:  # fmt: skip
    """All outputs of a panel by some vectors of rows, from number `first`, for one run of pairs from `factors` on.

    factors: (first pair, array of factors [vectors, G, 16], group).
    """
    begin, factors_VGL, g = factors
    w, t, t_step = line_of(decoded) + _PAIR * begin, line_of(sums), _VECTOR * vectors
    x, of_rows = line_of(turned) + first * x_step + begin * _VECTOR, factors_VGL[first, g].ctypes.data
    groups = factors_VGL.shape[1]
    for o in range(0, PANEL, _SUMS // vectors):
        at, own, to = w + o * w_step, scales_P.ctypes.data + 4 * o, t + o * t_step
        if vectors == 4:
            _tile_4(at, w_step, pairs, x, x_step, own, of_rows, _VECTOR * groups, to, t_step)
        elif vectors == 2:
            _tile_2(at, w_step, pairs, x, x_step, own, of_rows, _VECTOR * groups, to, t_step)
        else:
            _tile_1(at, w_step, pairs, x, x_step, own, of_rows, _VECTOR * groups, to, t_step)


@serial
def store_panel(
    vectors: int, first: int, begin: int, sums: Any, bias: int, num_rows: int, num_outputs: int, y: int, size: int
) -> None:
    """The sums of a panel and some vectors of rows, plus biases, to y, whose numbers have `size` bytes."""
    t, step = line_of(sums), _VECTOR * vectors
    for number in range(vectors):
        row = (first + number) * LANES
        for o in range(0, PANEL, LANES):
            n = begin + o
            to, own = y + (row * num_outputs + n) * size, bias + 4 * n if bias != 0 else 0
            store_results(
                t + o * step + _VECTOR * number, step, own, to, num_outputs * size, num_rows - row, np.int64(size == 2)
            )


@serial
def turn_rows(
    x: int, num_rows: int, num_inputs: int, vector: int, turned: Any, x_step: int, factors_MG: Any, factors_VGL: Any
) -> None:
    """A vector of rows and their scales."""
    num_pairs, first = num_inputs // 2, vector * LANES
    to = line_of(turned) + vector * x_step
    for pair in range(0, num_pairs, LANES):
        at = min(pair, num_pairs - LANES)
        place = x + 2 * num_inputs * first + _PAIR * at
        turn_inputs(place, 2 * num_inputs, num_rows - 1 - first, to + at * _VECTOR)
    for g in range(factors_MG.shape[1]):
        for lane in range(LANES):
            factors_VGL[vector, g, lane] = factors_MG[min(num_rows - 1, first + lane), g]


@parallel
def multiply_float8_panels(
    codes_NK: Any, scales: Any, spread: int, x: int, factors_MG: Any, bias: int, y: int, half: bool
) -> None:
    """y = x w^T + bias, in bf16 (`half`) or fp32, of rows in bf16; these by address (bias 0: none).

    Codes in uint8 that are not NaN have scales [lines, G], of which `spread` outputs share a line, rows [M, G].
    """
    (N, K), (M, G) = codes_NK.shape, factors_MG.shape
    num_vectors, num_pairs, run = (M + LANES - 1) // LANES, K // 2, GROUP // 2 if G > 1 else RUN // 2
    # An odd number of lines apart: else rows share a few places of the first cache.
    x_step, w_step = (num_pairs | 1) * _VECTOR, ((2 * K + 63) // 64 | 1) * 64
    turned, factors_VGL = np.empty(num_vectors * x_step + 64, np.uint8), np.empty((num_vectors, G, LANES), np.float32)
    for vector in prange(num_vectors):
        turn_rows(x, M, K, vector, turned, x_step, factors_MG, factors_VGL)
    for panel in prange((N + PANEL - 1) // PANEL):
        begin = min(panel * PANEL, N - PANEL)
        decoded, sums = np.empty(PANEL * w_step + 64, np.uint8), np.empty(PANEL * LANES * _VECTORS + 16, np.float32)
        scales_GP = np.empty((G, PANEL), np.float32)
        decode_panel((codes_NK.ctypes.data, K, scales.ctypes.data, G, spread), begin, decoded, w_step, scales_GP)
        v = 0
        while v < num_vectors:
            left = num_vectors - v
            vectors = 4 if left >= 4 else 2 if left >= 2 else 1
            sums[:] = 0
            for pair in range(0, num_pairs, run):
                g, pairs = pair // run if G > 1 else 0, min(run, num_pairs - pair)
                add_run(vectors, decoded, w_step, turned, x_step, v, pairs, scales_GP[g], (pair, factors_VGL, g), sums)
            store_panel(vectors, v, begin, sums, bias, M, N, y, 2 if half else 4)
            v += vectors
