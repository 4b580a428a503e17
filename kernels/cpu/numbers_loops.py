"""Numbers in compiled loops: stored ones as fp32 and back, and an exponential that vectorizes.

Numba knows no bf16, so its bits come as uint16. Imports Numba (see `compiled.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from trine.kernels.cpu.compiled import exact, serial


@intrinsic
def widen(typing: Any, value: Any) -> Any:
    """A stored number as fp32: of bf16 its bits as uint16, int8, or fp32 itself."""

    def from_bf16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(types.int32)
        bits = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    def from_int8(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], context.get_value_type(types.float32))

    def unchanged(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    known = {types.uint16: from_bf16, types.int8: from_int8, types.float32: unchanged}
    return (types.float32(value), known[value]) if value in known else None


@intrinsic
def bits_of(typing: Any, value: Any) -> Any:
    """The 32 bits of an fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def from_bits(typing: Any, value: Any) -> Any:
    """The fp32 of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
def add_product(typing: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a b of two int8 in int32; Numba's own integers would grow to 64 bits and halve the speed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (builder.sext(argument, context.get_value_type(types.int32)) for argument in arguments[1:])
        return builder.add(arguments[0], builder.mul(a, b))

    return types.int32(types.int32, types.int8, types.int8), generate


@exact
def to_bf16(value: Any) -> Any:
    """The bits of the nearest bf16, ties to even; NaN stays one."""
    bits = bits_of(np.float32(value))
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def store(row: Any, place: int, value: float) -> None:
    """row[place] = value in the row's numbers: fp32, bf16 as uint16 (rounded), int8 (a whole number)."""
    raise NotImplementedError("compiled code only")


@overload(store)
def _store(row: Any, place: Any, value: Any) -> Any:  # Numba wants what it returns to have the same annotations
    def narrow(row: Any, place: Any, value: Any) -> Any:
        row[place] = to_bf16(value)

    def cut(row: Any, place: Any, value: Any) -> Any:
        row[place] = np.int8(value)

    def keep(row: Any, place: Any, value: Any) -> Any:
        row[place] = value

    return {types.uint16: narrow, types.int8: cut}.get(row.dtype, keep)


@exact
def exponential(x: Any) -> Any:
    """e^x in fp32 within 2 units in the last place; 0 becomes the least normal number, inf e^88. NaN stays one.

    x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; e^r by its series. Unlike the C
    library's, it vectorizes.
    """
    y = np.float32(-87.0) if x < np.float32(-87.0) else np.float32(x)
    y = np.float32(88.0) if y > np.float32(88.0) else y
    n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
    r = (y - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    series = np.float32(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + np.float32(factor)
    return series * from_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@serial
def dot(row: Any, x: Any) -> Any:
    """The sum of row[j] x[j] in fp32; the row in any stored numbers, x in fp32, both contiguous."""
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += widen(row[j]) * x[j]
    return total
