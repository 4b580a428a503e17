"""Sums of rows of a matrix, each number of the result one chain of multiply-adds. Imports Numba (see `compiled.py`).

Written as LLVM's vectors, which stay in registers along the chain; the compiler's own vectors would go to memory and
back at each step. A chain has one order and `fma` one rounding, so the bits are the same on every CPU.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
# Vectors side by side: a multiply-add takes about four cycles, in which as many others can begin.
_WAYS = 4

_LONG, _FLOAT = ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)


def _load(builder: Any, address: Any) -> Any:
    return builder.load(builder.bitcast(address, _FLOATS.as_pointer()), align=4)


def _spread(builder: Any, value: Any) -> Any:
    """One number in all lanes."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def add_rows(typing: Any, weights_I: Any, begin: Any, end: Any, rows_IJ: Any, sums_J: Any) -> Any:
    """sums[j] = ((sums[j] + w[begin] rows[begin, j]) + w[begin + 1] rows[begin + 1, j]) + ..., up to `end`.

    fp32, contiguous; J is a multiple of `LANES`.
    """
    arrays = (weights_I, rows_IJ, sums_J)
    if any(array.dtype != types.float32 or array.layout != "C" for array in arrays):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, rows, sums = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip(arrays, (arguments[0], arguments[3], arguments[4]), strict=True)
        )
        begin, end = arguments[1], arguments[2]
        width = cgutils.unpack_tuple(builder, rows.shape)[1]
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
        )

        def chain(column: Any, ways: int) -> None:
            places = [builder.gep(sums.data, [builder.add(column, _LONG(LANES * way))]) for way in range(ways)]
            totals = [cgutils.alloca_once(builder, _FLOATS) for _ in places]
            for total, place in zip(totals, places, strict=True):
                builder.store(_load(builder, place), total)
            with cgutils.for_range_slice(builder, begin, end, _LONG(1)) as (index, _):
                weight = _spread(builder, builder.load(builder.gep(weights.data, [index])))
                first = builder.add(builder.mul(index, width), column)
                for way, total in enumerate(totals):
                    row = _load(builder, builder.gep(rows.data, [builder.add(first, _LONG(LANES * way))]))
                    builder.store(builder.call(fma, [weight, row, builder.load(total)]), total)
            for total, place in zip(totals, places, strict=True):
                builder.store(builder.load(total), builder.bitcast(place, _FLOATS.as_pointer()), align=4)

        wide = builder.sdiv(width, _LONG(_WAYS * LANES))
        with cgutils.for_range(builder, wide) as loop:
            chain(builder.mul(loop.index, _LONG(_WAYS * LANES)), _WAYS)
        done = builder.mul(wide, _LONG(_WAYS * LANES))
        with cgutils.for_range(builder, builder.sdiv(builder.sub(width, done), _LONG(LANES))) as loop:
            chain(builder.add(done, builder.mul(loop.index, _LONG(LANES))), 1)
        return context.get_dummy_value()

    return types.void(weights_I, types.int64, types.int64, rows_IJ, sums_J), generate
