"""Vectors of 16 numbers in compiled loops: what a compiler does not find by itself. Imports Numba (see `compiled.py`).

Numba has no vectors; these types and functions are LLVM's own, without instructions of one CPU, so that they compile
everywhere and to one AVX512 instruction each where there is AVX512. The number of rows of x that are multiplied at once
is part of a type: `rows` is a tuple of row numbers, and only its length decides what is compiled.

    Words   16 int32: of 16 outputs, neighbours along K as codes of 4 bits (8 of them) or 8 bits (4)
    Sums    for each of `rows`, `ways` vectors of 16 fp32 sums. With few rows there are several, added at the end:
            one would wait for itself at each step.

Memory is read 4 KiB ahead: measured on one core, 4-bit weights come 1.4 times as fast, bf16 ones 1.5 times as fast.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
AHEAD_BYTES = 4096

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
# Arrays of these carry bf16 and fp16 as their bits.
_STORED = {types.float32: _FLOAT, types.uint16: ir.IntType(16), types.int16: ir.IntType(16), types.int8: ir.IntType(8)}


class Words(types.Type):  # type: ignore[misc]
    """16 int32."""

    def __init__(self) -> None:
        super().__init__("Words")


class Sums(types.Type):  # type: ignore[misc]
    """`count` rows times `ways` vectors of 16 fp32."""

    def __init__(self, count: int, ways: int) -> None:
        self.count, self.ways = count, ways
        super().__init__(f"Sums({count}, {ways})")


@register_model(Words)
class _WordsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, front: Any) -> None:
        super().__init__(manager, front, _INTS)


@register_model(Sums)
class _SumsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, front: Any) -> None:
        super().__init__(manager, front, ir.ArrayType(_FLOATS, front.count * front.ways))


_WORDS = Words()
_LANES = Sums(1, 1)


def _ways(count: int) -> int:
    return max(1, 4 // count)


def place_of(context: Any, builder: Any, kind: Any, array: Any, *indices: Any) -> Any:
    """The address of a number of a contiguous array of one or two dimensions."""
    view = context.make_array(kind)(context, builder, array)
    index = indices[-1]
    if len(indices) == 2:
        width = cgutils.unpack_tuple(builder, view.shape)[1]
        index = builder.add(builder.mul(indices[0], width), index)
    return builder.gep(view.data, [index])


def _spread(builder: Any, value: Any) -> Any:
    """16 times one fp32."""
    empty = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(empty, value, _INT(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))


def same(value: int) -> Any:
    """16 times one int32 known when compiling."""
    return ir.Constant(_INTS, [value] * LANES)


def load_as_floats(context: Any, builder: Any, kind: Any, array: Any, *indices: Any) -> Any:
    """16 neighbours as fp32."""
    element = _STORED[kind.dtype]
    address = place_of(context, builder, kind, array, *indices)
    stored = builder.load(builder.bitcast(address, ir.VectorType(element, LANES).as_pointer()))
    stored.align = 4 if kind.dtype == types.float32 else element.width // 8
    if kind.dtype == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(stored, _INTS), same(16)), _FLOATS)
    if kind.dtype == types.int16:
        halves = builder.bitcast(stored, ir.VectorType(ir.HalfType(), LANES))
        return builder.fpext(halves, _FLOATS)
    return builder.sitofp(stored, _FLOATS) if kind.dtype == types.int8 else stored


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line AHEAD_BYTES behind an address; whatever lies there, that does no harm."""
    byte = ir.IntType(8).as_pointer()
    ahead = builder.gep(builder.bitcast(address, byte), [_LONG(AHEAD_BYTES)])
    signature = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    prefetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(prefetch, [ahead, _INT(0), _INT(3), _INT(1)])  # to read, keep in all caches, data


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, which may be one instruction."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


@intrinsic
def load_words(typing: Any, words: Any, place: Any) -> Any:
    """words[place : place + 16] of int32; what lies ahead is asked for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = place_of(context, builder, signature.args[0], *arguments)
        prefetch(builder, address)
        loaded = builder.load(builder.bitcast(address, _INTS.as_pointer()))
        loaded.align = 4
        return loaded

    return _WORDS(words, types.int64), generate


@intrinsic
def no_sums(typing: Any, rows: Any) -> Any:
    """Sums of zero for as many rows, in several ways."""
    kind = Sums(rows.count, _ways(rows.count))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(kind), None)

    return kind(rows), generate


def host_has(feature: str) -> bool:
    """Whether code is compiled for a CPU that has an instruction: this one, unless the user says otherwise."""
    own = config.CPU_NAME is None and config.CPU_FEATURES is None
    return own and bool(llvmlite.binding.get_host_cpu_features().get(feature))


def codes_of(builder: Any, words: Any, count: int) -> list[Any]:
    """The codes of each word, of which there are `count`, as vectors of fp32."""
    bits = 32 // count
    if bits == 4 and host_has("avx512f"):  # a shift and a look-up instead of two shifts and a conversion
        signature = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
        look_up = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.permvar.sf.512")
        table = ir.Constant(_FLOATS, [float(code - 16 if code > 7 else code) for code in range(LANES)])
        return [builder.call(look_up, [table, builder.lshr(words, same(4 * index))]) for index in range(count)]
    on_top = [builder.shl(words, same(32 - bits * (index + 1))) for index in range(count)]
    return [builder.sitofp(builder.ashr(word, same(32 - bits)), _FLOATS) for word in on_top]


@intrinsic
def add_codes(typing: Any, sums: Any, words: Any, shifts: Any, origin: Any, x: Any, k: Any, rows: Any) -> Any:
    """sums + (the codes of `words` - origin) times x[row, k], x[row, k + 1], ...

    A word has as many codes as the tuple `shifts` numbers. `origin` is of one row, or None for zero.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, words, _, origin, x, k, rows = arguments
        count, ways = signature.args[6].count, signature.args[0].ways
        places = [
            place_of(context, builder, signature.args[4], x, row, k) for row in cgutils.unpack_tuple(builder, rows)
        ]
        parts = cgutils.unpack_tuple(builder, sums)
        for index, code in enumerate(codes_of(builder, words, signature.args[2].count)):
            if signature.args[3] != types.none:
                code = builder.fsub(code, builder.extract_value(origin, 0))
            for m, place in enumerate(places):
                number = _spread(builder, builder.load(builder.gep(place, [_LONG(index)])))
                part = m + count * (index % ways)
                parts[part] = multiply_add(builder, code, number, parts[part])
        return _array(builder, sums, parts)

    return sums(sums, words, shifts, origin, x, types.int64, rows), generate


def _array(builder: Any, array: Any, parts: Any) -> Any:
    for index, part in enumerate(parts):
        array = builder.insert_value(array, part, index)
    return array


def _joined(builder: Any, kind: Any, sums: Any) -> list[Any]:
    """A vector for each row: the ways added up."""
    parts: list[Any] = cgutils.unpack_tuple(builder, sums)
    totals = parts[: kind.count]
    for index, part in enumerate(parts[kind.count :]):
        row = index % kind.count
        totals[row] = builder.fadd(totals[row], part)
    return totals


@intrinsic
def add_scaled(typing: Any, totals: Any, sums: Any, scale: Any) -> Any:
    """totals + sums scale, a scale for each lane; the first of totals' ways takes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, sums, scale = arguments
        numbers = builder.extract_value(scale, 0)
        for m, part in enumerate(_joined(builder, signature.args[1], sums)):
            total = multiply_add(builder, part, numbers, builder.extract_value(totals, m))
            totals = builder.insert_value(totals, total, m)
        return totals

    return totals(totals, sums, scale), generate


@intrinsic
def store_lanes(typing: Any, totals: Any, y: Any, rows: Any, place: Any) -> Any:
    """y[row, place + lane] = the totals of each row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, y, rows, place = arguments
        vectors = _joined(builder, signature.args[0], totals)
        for row, total in zip(cgutils.unpack_tuple(builder, rows), vectors, strict=True):
            address = place_of(context, builder, signature.args[1], y, row, place)
            builder.store(total, builder.bitcast(address, _FLOATS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(totals, y, rows, types.int64), generate


@intrinsic
def add_row(typing: Any, sums: Any, weights: Any, n: Any, x: Any, k: Any, rows: Any) -> Any:
    """sums + weights[n, k + lane] x[row, k + lane], the weights in any stored numbers; 16 further on for each way."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, weights, n, x, k, rows = arguments
        kind, count = signature.args[0], signature.args[5].count
        parts = cgutils.unpack_tuple(builder, sums)
        for way in range(kind.ways):
            at = builder.add(k, _LONG(way * LANES))
            numbers = load_as_floats(context, builder, signature.args[1], weights, n, at)
            prefetch(builder, place_of(context, builder, signature.args[1], weights, n, at))
            for m, row in enumerate(cgutils.unpack_tuple(builder, rows)):
                others = load_as_floats(context, builder, signature.args[3], x, row, at)
                parts[m + count * way] = multiply_add(builder, numbers, others, parts[m + count * way])
        return _array(builder, sums, parts)

    return sums(sums, weights, types.int64, x, types.int64, rows), generate


@intrinsic
def store_totals(typing: Any, sums: Any, y: Any, rows: Any, n: Any) -> Any:
    """y[row, n] = all lanes of a row's sums together."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, y, rows, n = arguments
        signature_of_sum = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        add_up = cgutils.get_or_insert_function(builder.module, signature_of_sum, "llvm.vector.reduce.fadd.v16f32")
        vectors = _joined(builder, signature.args[0], sums)
        for row, vector in zip(cgutils.unpack_tuple(builder, rows), vectors, strict=True):
            total = builder.call(add_up, [_FLOAT(-0.0), vector], fastmath=("reassoc",))
            builder.store(total, place_of(context, builder, signature.args[1], y, row, n))
        return context.get_dummy_value()

    return types.void(sums, y, rows, types.int64), generate


# --- Dequantizing -----------------------------------------------------------------------------------------------------


class Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's bf16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


def narrow(builder: Any, kind: Any, vector: Any) -> Any:
    """fp32 as numbers of a kind, to nearest, ties to even."""
    if kind == types.float32:
        return vector
    short = ir.VectorType(ir.IntType(16), LANES)
    if host_has("avx512bf16"):  # elsewhere LLVM would call a library
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(Bfloat(), LANES)), short)
    bits = builder.bitcast(vector, _INTS)
    odd = builder.and_(builder.lshr(bits, same(16)), same(1))
    bits = builder.add(builder.add(bits, same(0x7FFF)), odd)
    return builder.trunc(builder.lshr(bits, same(16)), short)


@intrinsic
def load_lanes(typing: Any, numbers: Any, place: Any) -> Any:
    """numbers[place + lane] in fp32, as sums of one row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = load_as_floats(context, builder, signature.args[0], *arguments)
        return _array(builder, ir.Constant(context.get_value_type(_LANES), None), [loaded])

    return _LANES(numbers, types.int64), generate


@intrinsic
def store_codes(typing: Any, words: Any, shifts: Any, origin: Any, scale: Any, out: Any, k: Any, place: Any) -> Any:
    """out[k + i, place + lane] = (code i of each word - origin) scale, rounded to the numbers of `out`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, _, origin, scale, out, k, place = arguments
        kind, scale = signature.args[4], builder.extract_value(scale, 0)
        for index, code in enumerate(codes_of(builder, words, signature.args[1].count)):
            if signature.args[2] != types.none:
                code = builder.fsub(code, builder.extract_value(origin, 0))
            stored = narrow(builder, kind.dtype, builder.fmul(code, scale))
            address = place_of(context, builder, kind, out, builder.add(k, _LONG(index)), place)
            aligned = builder.store(stored, builder.bitcast(address, stored.type.as_pointer()))
            aligned.align = 4 if kind.dtype == types.float32 else 2
        return context.get_dummy_value()

    return types.void(words, shifts, origin, scale, out, types.int64, types.int64), generate
