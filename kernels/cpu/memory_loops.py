"""Memory by address in compiled loops, and calls of functions by address. Imports Numba (see `compiled.py`).

One call runs a whole step of a model, whose tensors come as a table of addresses: as arguments, some thirty arrays a
layer took 60 us a layer to be passed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.compiled import serial


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address in int64 as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def address_of(typing: Any, place: Any) -> Any:
    """A pointer as an address in int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.voidptr), generate


@intrinsic
def call(typing: Any, address: Any) -> Any:
    """Call the C function `int f(void)` at an address. (Of one that returns nothing the result is not to be used.)"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def call_with(typing: Any, address: Any, arguments: Any) -> Any:
    """Call the C function `void f(int64, ...)` at an address with a tuple of arguments.

    Numba compiles a function anew into each of its callers, and those into theirs; what is called by address it
    compiles once.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(ir.VoidType(), [word.type for word in words])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), words)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(arguments))), generate


@intrinsic
def claim(typing: Any, address: Any) -> Any:
    """The int64 at an address, and add 1 to it, as one action among threads: how they share out numbered work."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, word(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def finish(typing: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, after all that this thread has written: how work is said to be done."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        builder.atomic_rmw("add", builder.inttoptr(arguments[0], word.as_pointer()), word(1), "release")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def finished(typing: Any, address: Any) -> Any:
    """The int64 at an address, before all that this thread reads next: how much work is done."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing: Any) -> Any:
    """Tell an x86 that this is a loop that waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if "x86" in binding.get_process_triple():
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@serial
def floats(address: int, count: int) -> Any:
    """fp32 numbers at an address."""
    return carray(pointer(address), (count,), np.float32)


@serial
def shorts(address: int, count: int) -> Any:
    """uint16 at an address: the bits of bf16."""
    return carray(pointer(address), (count,), np.uint16)


@serial
def halves(address: int, count: int) -> Any:
    """int16 at an address: the bits of fp16."""
    return carray(pointer(address), (count,), np.int16)


@serial
def bytes_at(address: int, count: int) -> Any:
    """int8 at an address."""
    return carray(pointer(address), (count,), np.int8)


@serial
def words(address: int, count: int) -> Any:
    """int32 at an address."""
    return carray(pointer(address), (count,), np.int32)


@serial
def longs(address: int, count: int) -> Any:
    """int64 at an address."""
    return carray(pointer(address), (count,), np.int64)


@serial
def doubles(address: int, count: int) -> Any:
    """float64 numbers at an address."""
    return carray(pointer(address), (count,), np.float64)
