"""Keys and values of one head against several queries, as vector instructions. Imports Numba (see `compiled.py`).

Written as LLVM's vectors: as plain loops over a head's few channels most of the time went into what surrounds them
(the sum over a vector's lanes, a row of sums to memory and back for each key: 56 ns for a key and its value of 64
channels in the cache, here 22). A key or value is widened to fp32 once for up to `QUERIES` query heads.

- Scores: 16 sums are kept at once, of 16 keys and a query or 4 keys and 4, and brought into the lanes of one vector by
  adding halves. A sum is taken in one order, whichever others go with it.
- Values: 64 channels of each query's output stay in registers while all keys of a tile are added, key after key.

Both take the channels up to the last multiple of `LANES`; what is left is done by plain loops. Keys and values lie in a
pool (fp32, bf16 as uint16, int8) at places_T + offset, in numbers. Shapes: T keys, a multiple of `LANES` for scores; G
queries, D channels, both in fp32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from trine.kernels.cpu.vector_loops import LANES, floats_of, load, multiply_add, shuffle, splat

# Query heads for which a key or value is loaded once: this many, and the numbers below it that halve it.
QUERIES = 4
# Vectors of an output side by side: a multiply-add takes about four cycles, in which as many others can begin.
_WAYS = 4

_I16, _I64, _F32 = ir.IntType(16), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_STORED = {types.float32: _F32, types.uint16: _I16, types.int8: ir.IntType(8)}


class _Rows:
    """Addresses in an array of numbers: of a row in one or two dimensions, the last of which lies closely."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.size = builder, kind.dtype.bitwidth // 8
        self.base = builder.ptrtoint(array.data, _I64)
        self.step = cgutils.unpack_tuple(builder, array.strides)[0]

    def row(self, index: Any) -> Any:
        return self.builder.add(self.base, self.builder.mul(index, self.step))

    def at(self, row: Any, number: Any) -> Any:
        return self.builder.add(row, self.builder.mul(number, _I64(self.size)))


def _into_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sum of the lanes of vector i in lane i; every sum adds the same halves."""
    width = LANES // 2
    while width:
        low = [lane for lane in range(2 * LANES) if lane % (2 * width) < width]
        # Pieces of `width` lanes, in turn from the first and the second vector.
        pieces = [low[i : i + width] for i in range(0, len(low), width)]
        half = len(pieces) // 2
        lanes = [lane for pair in zip(pieces[:half], pieces[half:], strict=True) for piece in pair for lane in piece]
        mask, other = (
            ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane + add for lane in lanes]) for add in (0, width)
        )
        count = len(vectors) // 2
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, mask), builder.shuffle_vector(a, b, other))
            for a, b in zip(vectors[:count], vectors[count:], strict=True)
        ]
        width //= 2
    return vectors[0]


def _known(k: Any, *floats: Any) -> bool:
    return k.dtype in _STORED and all(x.dtype == types.float32 for x in floats)


def _score_heads(count: int) -> Any:
    """s[g, t] = sum_d k[t, d] q[g, d] for `count` queries g, from the one numbered `first` on."""

    def declare(typing: Any, k: Any, places_T: Any, offset: Any, q_GD: Any, first: Any, s_GT: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = (k, places_T, q_GD, s_GT)
            values = (arguments[0], arguments[1], arguments[3], arguments[5])
            pool, places, q, s = (_Rows(context, builder, *pair) for pair in zip(kinds, values, strict=True))
            offset, first = arguments[2], arguments[4]
            num_keys, num_channels = (
                cgutils.unpack_tuple(builder, context.make_array(kind)(context, builder, value).shape)[-1]
                for kind, value in ((s_GT, arguments[5]), (q_GD, arguments[3]))
            )
            queries = [builder.add(first, _I64(c)) for c in range(count)]
            width = LANES // count
            with cgutils.for_range(builder, builder.sdiv(num_keys, _I64(width))) as tile:
                begin = builder.mul(tile.index, _I64(width))
                rows = []
                for w in range(width):
                    place = load(builder, places.row(builder.add(begin, _I64(w))), _I64)
                    rows.append(pool.at(pool.base, builder.add(place, offset)))
                zero = ir.Constant(_FLOATS, None)
                totals = [cgutils.alloca_once_value(builder, zero) for _ in range(LANES)]
                for total in totals:
                    builder.store(zero, total)
                with cgutils.for_range(builder, builder.sdiv(num_channels, _I64(LANES))) as block:
                    channel = builder.mul(block.index, _I64(LANES))
                    inputs = [load(builder, q.at(q.row(query), channel), _FLOATS) for query in queries]
                    for w, row in enumerate(rows):
                        key = floats_of(builder, pool.at(row, channel), _STORED[k.dtype])
                        for c, x in enumerate(inputs):
                            total = totals[c * width + w]
                            builder.store(multiply_add(builder, key, x, builder.load(total)), total)
                scores = _into_lanes(builder, [builder.load(total) for total in totals])
                for c, query in enumerate(queries):
                    part = shuffle(builder, scores, list(range(c * width, (c + 1) * width)))
                    address = builder.inttoptr(s.at(s.row(query), begin), part.type.as_pointer())
                    builder.store(part, address, align=4)
            return context.get_dummy_value()

        if not _known(k, q_GD, s_GT):
            return None
        return types.void(k, places_T, types.int64, q_GD, types.int64, s_GT), generate

    declare.__doc__ = _score_heads.__doc__
    return intrinsic(declare)


def _add_heads(count: int) -> Any:
    """o[g] += sum_t weights[g, t] v[t] for `count` queries g, from the one numbered `first` on."""

    def declare(typing: Any, v: Any, places_T: Any, offset: Any, weights_GT: Any, first: Any, o_GD: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = (v, places_T, weights_GT, o_GD)
            values = (arguments[0], arguments[1], arguments[3], arguments[5])
            pool, places, weights, o = (_Rows(context, builder, *pair) for pair in zip(kinds, values, strict=True))
            offset, first = arguments[2], arguments[4]
            num_keys, num_channels = (
                cgutils.unpack_tuple(builder, context.make_array(kind)(context, builder, value).shape)[-1]
                for kind, value in ((places_T, arguments[1]), (o_GD, arguments[5]))
            )
            queries = [builder.add(first, _I64(c)) for c in range(count)]
            weight_rows = [weights.row(query) for query in queries]

            def columns(channel: Any, ways: int) -> None:
                ends = [builder.add(channel, _I64(LANES * way)) for way in range(ways)]
                at = [[o.at(o.row(query), end) for end in ends] for query in queries]
                totals = [[cgutils.alloca_once(builder, _FLOATS) for _ in ends] for _ in queries]
                for row, held in zip(at, totals, strict=True):
                    for place, total in zip(row, held, strict=True):
                        builder.store(load(builder, place, _FLOATS), total)
                with cgutils.for_range(builder, num_keys) as loop:
                    place = builder.add(load(builder, places.row(loop.index), _I64), offset)
                    value_row = pool.at(pool.base, place)
                    factors = [splat(builder, load(builder, weights.at(row, loop.index), _F32)) for row in weight_rows]
                    for way, end in enumerate(ends):
                        value = floats_of(builder, pool.at(value_row, end), _STORED[v.dtype])
                        for factor, held in zip(factors, totals, strict=True):
                            builder.store(multiply_add(builder, factor, value, builder.load(held[way])), held[way])
                for row, held in zip(at, totals, strict=True):
                    for place, total in zip(row, held, strict=True):
                        address = builder.inttoptr(place, _FLOATS.as_pointer())
                        builder.store(builder.load(total), address, align=4)

            wide = builder.sdiv(num_channels, _I64(_WAYS * LANES))
            with cgutils.for_range(builder, wide) as loop:
                columns(builder.mul(loop.index, _I64(_WAYS * LANES)), _WAYS)
            done = builder.mul(wide, _I64(_WAYS * LANES))
            with cgutils.for_range(builder, builder.sdiv(builder.sub(num_channels, done), _I64(LANES))) as loop:
                columns(builder.add(done, builder.mul(loop.index, _I64(LANES))), 1)
            return context.get_dummy_value()

        if not _known(v, weights_GT, o_GD):
            return None
        return types.void(v, places_T, types.int64, weights_GT, types.int64, o_GD), generate

    declare.__doc__ = _add_heads.__doc__
    return intrinsic(declare)


score_one, score_two, score_four = (_score_heads(count) for count in (1, 2, QUERIES))
add_one, add_two, add_four = (_add_heads(count) for count in (1, 2, QUERIES))


@intrinsic
def fetch_rows(typing: Any, pool: Any, places_T: Any, offset: Any, count: Any) -> Any:
    """Have the memory of `count` numbers from every place + offset on read into the second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, places = (
            _Rows(context, builder, kind, value) for kind, value in ((pool, arguments[0]), (places_T, arguments[1]))
        )
        offset, count = arguments[2:]
        num_keys = cgutils.unpack_tuple(builder, context.make_array(places_T)(context, builder, arguments[1]).shape)[0]
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        with cgutils.for_range(builder, num_keys) as key:
            row = numbers.at(numbers.base, builder.add(load(builder, places.row(key.index), _I64), offset))
            lines = builder.sdiv(builder.add(builder.mul(count, _I64(numbers.size)), _I64(63)), _I64(64))
            with cgutils.for_range(builder, lines) as line:
                address = builder.inttoptr(builder.add(row, builder.mul(line.index, _I64(64))), byte)
                builder.call(prefetch, [address, word(0), word(2), word(1)])  # to read, not into the first cache, data
        return context.get_dummy_value()

    return types.void(pool, places_T, types.int64, types.int64), generate
