"""float8 (e4m3) and MXFP4 (e2m1) codes as numbers, 16 at a time. Imports Numba (see `compiled.py`).

A code's exponent and fraction are moved to their places in fp32; subnormal codes are whole numbers times a power of
two, since fp32's own subnormal numbers cost a CPU a hundred cycles.

Shapes: N rows, G groups of a row. Results are fp32: a CPU's own conversion to bf16 loses subnormal numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import exact, parallel
from trine.kernels.cpu.vector_loops import LANES, load, splat

# Numbers that share a scale in MXFP4.
_GROUP = 32
_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()


def _number(builder: Any, code: Any, *, fraction: int, sign: int, bias: int, least: float) -> Any:
    """fp32 of codes in int32, one or a vector: `fraction` bits of it, `sign` the place of that bit.

    `bias`: fp32's less the code's. `least`: the smallest positive number.
    """
    lanes = LANES if isinstance(code.type, ir.VectorType) else 0
    floats = ir.VectorType(_F32, LANES) if lanes else _F32

    def constant(kind: Any, value: Any) -> Any:
        return ir.Constant(ir.VectorType(kind, LANES), [value] * LANES) if lanes else kind(value)

    magnitude = builder.and_(code, constant(_I32, (1 << sign) - 1))
    shifted = builder.shl(magnitude, constant(_I32, 23 - fraction))
    normal = builder.add(shifted, constant(_I32, bias << 23))
    small = builder.fmul(builder.sitofp(magnitude, floats), constant(_F32, least))
    is_normal = builder.icmp_signed(">=", magnitude, constant(_I32, 1 << fraction))
    bits = builder.select(is_normal, normal, builder.bitcast(small, code.type))
    signs = builder.shl(builder.and_(code, constant(_I32, 1 << sign)), constant(_I32, 31 - sign))
    return builder.bitcast(builder.or_(bits, signs), floats)


def e4m3(builder: Any, code: Any) -> Any:
    """The numbers in fp32 of codes in int32, one or a vector."""
    return _number(builder, code, fraction=3, sign=7, bias=120, least=2.0**-9)


def _e2m1(builder: Any, code: Any) -> Any:
    return _number(builder, code, fraction=1, sign=3, bias=126, least=0.5)


def wide(builder: Any, address: Any) -> Any:
    """16 bytes in int32."""
    return builder.zext(load(builder, address, ir.VectorType(_I8, LANES)), ir.VectorType(_I32, LANES))


def _keep(builder: Any, numbers: Any, address: Any) -> None:
    builder.store(numbers, builder.inttoptr(address, numbers.type.as_pointer())).align = 4


@intrinsic
def from_e4m3(typing: Any, code: Any) -> Any:
    """The number of a code in uint8, which is not NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return e4m3(builder, builder.zext(arguments[0], _I32))

    return types.float32(types.uint8), generate


@intrinsic
def lanes_e4m3(typing: Any, codes: Any, scale: Any, w: Any) -> Any:
    """The numbers of 16 codes at an address, times a scale, to another address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scale, w = arguments
        _keep(builder, builder.fmul(e4m3(builder, wide(builder, codes)), splat(builder, scale)), w)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@intrinsic
def group_e2m1(typing: Any, codes: Any, scale: Any, w: Any) -> Any:
    """As `lanes_e4m3`, of the 32 codes in 16 bytes, the lower half of a byte first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, scale, w = arguments
        both = wide(builder, codes)
        low = _e2m1(builder, both)
        high = _e2m1(builder, builder.lshr(both, ir.Constant(both.type, [4] * LANES)))
        for half in range(2):
            mask = [half * 8 + j // 2 + (j % 2) * LANES for j in range(LANES)]
            numbers = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, LANES), mask))
            place = builder.add(w, ir.IntType(64)(half * LANES * 4))
            _keep(builder, builder.fmul(numbers, splat(builder, scale)), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@exact
def _scaled_e4m3(codes: Any, start: int, stop: int, scale: Any, w: Any) -> None:
    whole = start + (stop - start) // LANES * LANES
    for place in range(start, whole, LANES):
        lanes_e4m3(codes.ctypes.data + place, scale, w.ctypes.data + 4 * place)
    for place in range(whole, stop):
        w[place] = from_e4m3(codes[place]) * scale


@parallel
def dequantize_e4m3(codes: Any, scales: Any, first: int, spread: int, block: int, width: int, w: Any) -> None:
    """w = q s, both [N, K] as one row; row n and column k have the scale [(first + n) / spread, k / block]."""
    for n in prange(codes.shape[0] // width):
        for b in range(scales.shape[1]):
            start, stop = n * width + b * block, n * width + min(width, (b + 1) * block)
            _scaled_e4m3(codes, start, stop, scales[(first + n) // spread, b], w)


@parallel
def dequantize_e2m1(codes: Any, scales_NG: Any, w: Any) -> None:
    """w = q s as one row, two codes a byte, a scale for each 32 of them."""
    N, G = scales_NG.shape
    for n in prange(N):
        for g in range(G):
            place = (n * G + g) * _GROUP
            group_e2m1(codes.ctypes.data + place // 2, scales_NG[n, g], w.ctypes.data + 4 * place)
