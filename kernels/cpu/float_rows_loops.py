"""Few rows times a weight of float8 (e4m3) or MXFP4 (e2m1) codes, which are decoded in registers. Imports Numba.

As in `vector_loops.py`, rows of the weight are read in `STREAMS` far apart at once, for one input or for four. Steps
multiply by e4m3 in the same way (`product_loops.py`), on CPUs without these instructions in more of them.

e4m3: a code's seven bits, moved to where fp16 has exponent and fraction, are its number over 2^8, subnormal codes
included; the CPU widens 16 of them in one instruction. Scales of blocks go into the inputs of 128 outputs, others to
the sums.

e2m1: 16 numbers are a vector, out of which one instruction takes those of 16 codes. 16 bytes hold 32 codes that share
a scale, even k in the low halves; so inputs come as the 16 even and the 16 odd ones of 32.

Shapes: M rows, K inputs, N outputs, B blocks of 32 inputs. Sums are fp32; a row's are added in one order, whichever
rows go with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import parallel, serial
from trine.kernels.cpu.float_codes_loops import e4m3, wide
from trine.kernels.cpu.lanes_loops import narrow
from trine.kernels.cpu.vector_loops import LANES, STREAMS, block_of_row, load, multiply_add, splat, store_sums

# Inputs of a block (of e2m1 those that share a scale), and outputs of a piece of work (of e4m3 those that share scales
# of blocks).
BLOCK, PIECE = 32, 128
HALF_SCALE = np.float32(2.0**8)
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

_I8, _I16, _I32, _I64, _F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_BYTES, _SHORTS, _WORDS = (ir.VectorType(kind, LANES) for kind in (_I8, _I16, _I32))
_HALVES, _FLOATS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(_F32, LANES)


def has_instructions() -> bool:
    """Whether this CPU has those for vectors of 16 numbers: of halves, and to take numbers out of a vector."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f")) and bool(features.get("avx512bw"))


def from_e4m3_lanes(builder: Any, address: Any) -> Any:
    """The numbers of 16 codes over 2^8."""
    if not has_instructions():
        return builder.fmul(
            e4m3(builder, wide(builder, address)), ir.Constant(_FLOATS, [1 / float(HALF_SCALE)] * LANES)
        )
    moved = builder.sext(load(builder, address, _BYTES), _SHORTS)  # the sign stands twice once they are moved
    bits = builder.and_(builder.shl(moved, ir.Constant(_SHORTS, [7] * LANES)), ir.Constant(_SHORTS, [~0x4000] * LANES))
    return builder.fpext(builder.bitcast(bits, _HALVES), _FLOATS)


def _from_e2m1(builder: Any, address: Any) -> list[Any]:
    """The numbers of the low and of the high halves of 16 bytes."""
    table = ir.Constant(_FLOATS, [*_E2M1, *(-number for number in _E2M1)])
    both = builder.zext(load(builder, address, _BYTES), _WORDS)
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _WORDS])
    take = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    high = builder.lshr(both, ir.Constant(_WORDS, [4] * LANES))
    return [builder.call(take, [table, codes]) for codes in (both, high)]  # which looks at four bits of each


def _power(builder: Any, address: Any) -> Any:
    """2^(s - 127) of the byte s, in all lanes; that of 0 is a subnormal number."""
    bits = builder.shl(builder.zext(load(builder, address, _I8), _I32), _I32(23))
    least = builder.icmp_unsigned("==", bits, _I32(0))
    return splat(builder, builder.bitcast(builder.select(least, _I32(0x00400000), bits), _F32))


def _rows(count: int, *, of_e2m1: bool) -> Any:
    """The intrinsic for `count` inputs: (row, step, row bytes, scales, scales' step, x, x_step, y, y_step, y_next).

    Addresses, and steps in bytes: between rows that are read at once, between their scales (of e2m1), between inputs,
    between the sums of those rows, between the sums of inputs. x is [B, 32], of e2m1 the even ones first.
    """
    size = BLOCK // 2 if of_e2m1 else BLOCK

    def declare(
        typing: Any, row: Any, step: Any, row_bytes: Any, scales: Any, scales_step: Any, x: Any, x_step: Any, y: Any,
        y_step: Any, y_next: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, step, row_bytes, scales, scales_step, x, x_step, y, y_step, y_next = arguments

            def places(first: Any, apart: Any, number: int) -> list[Any]:
                return [builder.add(first, builder.mul(_I64(i), apart)) for i in range(number)]

            rows, inputs = places(row, step, STREAMS), places(x, x_step, count)
            factors = places(scales, scales_step, STREAMS)
            zero = ir.Constant(_FLOATS, None)
            totals = [[cgutils.alloca_once_value(builder, zero) for _ in rows] for _ in inputs]
            blocks = builder.sdiv(builder.add(row_bytes, _I64(size - 1)), _I64(size))
            with cgutils.for_range(builder, blocks) as loop:
                x_offset = builder.mul(loop.index, _I64(4 * BLOCK))
                offset = block_of_row(builder, loop.index, size, row_bytes)
                halves = [builder.add(x_offset, _I64(at)) for at in (0, 4 * LANES)]
                given = [[load(builder, builder.add(place, at), _FLOATS) for at in halves] for place in inputs]
                for s, place in enumerate(rows):
                    address = builder.add(place, offset)
                    if of_e2m1:
                        numbers = _from_e2m1(builder, address)
                        scale = _power(builder, builder.add(factors[s], loop.index))
                    else:
                        numbers = [from_e4m3_lanes(builder, builder.add(address, _I64(at))) for at in (0, LANES)]
                    for m, (first, second) in enumerate(given):
                        total = builder.load(totals[m][s])
                        if of_e2m1:
                            sums = multiply_add(builder, numbers[1], second, builder.fmul(numbers[0], first))
                            total = multiply_add(builder, sums, scale, total)
                        else:
                            total = multiply_add(builder, numbers[0], first, total)
                            total = multiply_add(builder, numbers[1], second, total)
                        builder.store(total, totals[m][s])
            for m, at in enumerate(places(y, y_next, count)):
                store_sums(builder, totals[m], at, y_step)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 10), generate

    return intrinsic(declare)


e4m3_rows, e4m3_rows_4 = _rows(1, of_e2m1=False), _rows(4, of_e2m1=False)
e2m1_rows, e2m1_rows_4 = _rows(1, of_e2m1=True), _rows(4, of_e2m1=True)


@intrinsic
def decode_lanes(typing: Any, codes: Any, scale: Any, numbers: Any) -> Any:
    """The numbers of 16 codes of e4m3 at an address over 2^8, times a scale, rounded to bf16 to another address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scale, numbers = arguments
        scaled = builder.fmul(from_e4m3_lanes(builder, codes), splat(builder, scale))
        builder.store(narrow(builder, types.uint16, scaled), builder.inttoptr(numbers, _SHORTS.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@serial
def streams(first: int, last: int) -> Any:
    """(distance of rows that are read at once, where the first of them ends): they overlap where rows are left over."""
    apart = (last - first) // STREAMS
    return apart, last - apart * (STREAMS - 1)


@serial
def cut_blocks(x_MK: Any, scales: Any, line: int, block: int, x_MB: Any) -> None:
    """Inputs times the scales of a line of blocks (none: as they are), 32 after 32.

    The last 32 end with the row: they overlap those before, with zeros there, so that no load leaves a row.
    """
    M, K = x_MK.shape
    for m in range(M):
        for begin in range(0, K, BLOCK):
            scale = scales[line, begin // block] if scales.shape[0] > 0 else np.float32(1)
            first = min(begin, K - BLOCK)
            for j in range(BLOCK):
                x_MB[m, begin + j] = x_MK[m, first + j] * scale
            for j in range(begin - first):
                x_MB[m, begin + j] = 0


@serial
def multiply_piece(
    codes: int, row_bytes: int, scales: int, num_scales: int, x_MB: Any, first: int, last: int, y_MN: Any, e2m1: bool
) -> None:
    """The sums of rows `first` to `last`, from the addresses of all; those of e4m3 over 2^8."""
    M, x_step, y_next = x_MB.shape[0], 4 * x_MB.shape[1], 4 * y_MN.shape[1]
    apart, stop = streams(first, last)
    step, scale_step, y_step = apart * row_bytes, apart * num_scales, 4 * apart
    for n in range(first, stop):
        row, scale = codes + n * row_bytes, scales + n * num_scales
        m = 0
        while m < M:
            x, y = x_MB.ctypes.data + m * x_step, y_MN.ctypes.data + m * y_next + 4 * n
            if M - m >= 4:
                if e2m1:
                    e2m1_rows_4(row, step, row_bytes, scale, scale_step, x, x_step, y, y_step, y_next)
                else:
                    e4m3_rows_4(row, step, row_bytes, scale, scale_step, x, x_step, y, y_step, y_next)
                m += 4
            else:
                if e2m1:
                    e2m1_rows(row, step, row_bytes, scale, scale_step, x, x_step, y, y_step, y_next)
                else:
                    e4m3_rows(row, step, row_bytes, scale, scale_step, x, x_step, y, y_step, y_next)
                m += 1


@parallel
def multiply_e4m3(codes_NK: Any, scales: Any, spread: int, x_MK: Any, y_MN: Any) -> None:
    """y = x w^T of codes in uint8; scales in fp32: [N, 1], or with a `spread` of 128 [ceil(N / 128), ceil(K / 128)].

    K is 32 at least.
    """
    N, K = codes_NK.shape
    M, B = x_MK.shape[0], (K + BLOCK - 1) // BLOCK
    for piece in prange((N + PIECE - 1) // PIECE):
        first, last = piece * PIECE, min(N, (piece + 1) * PIECE)
        x_MB = np.empty((M, B * BLOCK), np.float32)
        cut_blocks(x_MK, scales if spread > 1 else scales[:0], piece, spread, x_MB)
        multiply_piece(codes_NK.ctypes.data, K, 0, 0, x_MB, first, last, y_MN, False)
        for m in range(M):
            for n in range(first, last):
                y_MN[m, n] *= HALF_SCALE if spread > 1 else HALF_SCALE * scales[n, 0]


@parallel
def multiply_e2m1(codes_NH: Any, scales_NG: Any, x_MB: Any, y_MN: Any) -> None:
    """y = x w^T of two codes a byte, with a byte of scale for each 32 of them; x in halves of even and odd ones."""
    N, H = codes_NH.shape
    for piece in prange((N + PIECE - 1) // PIECE):
        first, last = piece * PIECE, min(N, (piece + 1) * PIECE)
        scales, G = scales_NG.ctypes.data, scales_NG.shape[1]
        multiply_piece(codes_NH.ctypes.data, H, scales, G, x_MB, first, last, y_MN, True)
