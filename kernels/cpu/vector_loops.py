"""Products of several rows of a weight with one input, as vector instructions. Imports Numba (see `compiled.py`).

Written as LLVM's vectors instead of loops, for three things that the vectorizer does not find:

- Rows are read in `STREAMS` far apart at once. A core of a server waits for memory; what hides the waiting is the
  hardware's prefetcher, which follows each row on its own (one row at a time 6.5 GB/s a core were measured on a
  Sapphire Rapids, six rows 15.5, six neighbouring rows 6.5).
- Codes of int8 and int4 meet inputs of int8 in the instruction that sums four products (vpdpbusd, where there is one).
- A row's sum is taken in one order, whichever rows go with it.

Inputs come in blocks (`product_loops.py`), the last of which ends with the row: it overlaps the one before, with zeros
there, so that no load leaves a row. All pointers are addresses in int64; rows must hold at least a block.

fp32, bf16 and int8 (scaled once a row):  y = sum_k w[k] x[k] in fp32.
Codes by codes:  y = sum_b s_b sum_{k in b} w[k] x[k], the inner sum exact in int32. Codes of weights are taken
unsigned, w + 128 or w + 8 (the layout of 4 bits stores that), so that sums begin at -128 or -8 times the sum of their
inputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Numbers of a block of inputs of fp32, and of inputs of int8 (64 bytes: a line of the cache).
FLOAT_BLOCK = 32
CODE_BLOCK = 64
STREAMS = 6
# How far ahead of a row memory is asked for: beyond the page that the hardware's prefetcher stays in.
AHEAD_BYTES = 2048
LANES = 16

_I8, _I16, _I32, _I64, _F32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_F16 = ir.HalfType()
_WORDS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_CODES = ir.VectorType(_I8, CODE_BLOCK)


def load(builder: Any, address: Any, kind: Any) -> Any:
    """One number or vector from an address that need not be aligned."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def fetch(builder: Any, address: Any, ahead: Any) -> None:
    """Ask for the line of memory so many bytes behind an address; whatever lies there, that does no harm."""
    place = builder.inttoptr(builder.add(address, ahead), _I8.as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, _I32(0), _I32(3), _I32(1)])


def shuffle(builder: Any, vector: Any, lanes: list[int]) -> Any:
    """A vector of some lanes of another."""
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def splat(builder: Any, value: Any) -> Any:
    """A number in all lanes."""
    vector = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    return shuffle(builder, builder.insert_element(vector, value, _I32(0)), [0] * LANES)


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **options: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, **options)


def multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """a b + total of vectors of fp32, rounded once."""
    return _call(builder, "llvm.fma.v16f32", _FLOATS, [a, b, total])


def has_dot_instruction() -> bool:
    """Whether this CPU has vpdpbusd on 512 bits."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni")) and bool(features.get("avx512f"))


def add_fours(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total[i] + sum of unsigned[4 i + j] signed[4 i + j], j < 4: bytes in int32."""
    if has_dot_instruction():
        words = [builder.bitcast(x, _WORDS) for x in (unsigned, signed)]
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _WORDS, [total, *words])
    wide = ir.VectorType(_I16, CODE_BLOCK)  # 255 * 127 still fits
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    for j in range(4):
        part = shuffle(builder, products, list(range(j, CODE_BLOCK, 4)))
        total = builder.add(total, builder.sext(part, _WORDS))
    return total


def fold(builder: Any, vectors: list[Any]) -> Any:
    """One vector with the sum of each of up to 16 vectors, filled up to a power of two; lanes are added in halves.

    Two vectors are folded together, so that half as many instructions do it, in the order in which one alone is.
    """
    zero, width = ir.Constant(vectors[0].type, None), LANES
    add = builder.add if vectors[0].type == _WORDS else builder.fadd
    vectors = vectors + [zero] * (_power_of_two(len(vectors)) - len(vectors))
    while width > 1:
        width //= 2
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0], None)]
        lanes = vectors[0].type.count * (1 if len(vectors) == 1 else 2)
        low = [lane for begin in range(0, lanes, 2 * width) for lane in range(begin, begin + width)]
        high = [lane + width for lane in low]
        vectors = [add(*(_of_both(builder, a, b, part) for part in (low, high))) for a, b in pairs]
    return vectors[0]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _of_both(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    """Lanes of two vectors behind each other, or of one."""
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
    return builder.shuffle_vector(first, ir.Constant(first.type, ir.Undefined) if second is None else second, mask)


def _store_lanes(builder: Any, vector: Any, count: int, y: Any, y_step: Any) -> None:
    """The first numbers of a vector, y_step bytes apart."""
    for s in range(count):
        place = builder.add(y, builder.mul(_I64(s), y_step))
        builder.store(builder.extract_element(vector, _I32(s)), builder.inttoptr(place, _F32.as_pointer()), align=4)


def store_sums(builder: Any, totals: list[Any], y: Any, y_step: Any) -> None:
    """Store the sum of every vector, y_step bytes apart."""
    _store_lanes(builder, fold(builder, [builder.load(total) for total in totals]), len(totals), y, y_step)


def _begin(builder: Any, row: Any, step: Any) -> tuple[list[Any], list[Any]]:
    """The addresses of the rows and a vector of zeros for each."""
    rows = [builder.add(row, builder.mul(_I64(s), step)) for s in range(STREAMS)]
    return rows, [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None)) for _ in rows]


def block_of_row(builder: Any, index: Any, size: int, num_inputs: Any) -> Any:
    """Where a block begins in its row: the last one ends with the row."""
    begin, last = builder.mul(index, _I64(size)), builder.sub(num_inputs, _I64(size))
    return builder.select(builder.icmp_signed("<", begin, last), begin, last)


def floats_of(builder: Any, address: Any, kind: Any) -> Any:
    """16 stored numbers as fp32."""
    if kind is _F32:
        return load(builder, address, _FLOATS)
    if kind is _I8:
        return builder.sitofp(builder.sext(load(builder, address, ir.VectorType(_I8, LANES)), _WORDS), _FLOATS)
    bits = builder.zext(load(builder, address, ir.VectorType(_I16, LANES)), _WORDS)
    return builder.bitcast(builder.shl(bits, ir.Constant(_WORDS, [16] * LANES)), _FLOATS)


def _float_rows(kind: Any, count: int) -> Any:
    """The intrinsic for rows of one kind of number and `count` inputs, for which a weight is converted once.

    (row, step between rows in bytes, inputs' length, x, y, step of y); inputs and their results follow each other after
    `x_step` and `y_next` bytes.
    """

    def declare(
        typing: Any, row: Any, step: Any, num_inputs: Any, x: Any, x_step: Any, y: Any, y_step: Any, y_next: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, step, num_inputs, x, x_step, y, y_step, y_next = arguments
            rows, _ = _begin(builder, row, step)
            totals = [
                [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None)) for _ in rows] for _ in range(count)
            ]
            places = [builder.add(x, builder.mul(_I64(m), x_step)) for m in range(count)]
            size = _I64({_F32: 4, _I16: 2, _I8: 1}[kind])
            blocks = builder.sdiv(builder.add(num_inputs, _I64(FLOAT_BLOCK - 1)), _I64(FLOAT_BLOCK))
            with cgutils.for_range(builder, blocks) as loop:
                begin = block_of_row(builder, loop.index, FLOAT_BLOCK, num_inputs)
                for half in range(0, FLOAT_BLOCK, LANES):
                    offset = builder.mul(builder.add(begin, _I64(half)), size)
                    x_offset = builder.add(builder.mul(loop.index, _I64(4 * FLOAT_BLOCK)), _I64(4 * half))
                    inputs = [load(builder, builder.add(place, x_offset), _FLOATS) for place in places]
                    for s, address in enumerate(rows):
                        if half == 0:
                            fetch(builder, builder.add(address, offset), _I64(AHEAD_BYTES))
                        weights = floats_of(builder, builder.add(address, offset), kind)
                        for m in range(count):
                            total = builder.load(totals[m][s])
                            builder.store(multiply_add(builder, weights, inputs[m], total), totals[m][s])
            for m in range(count):
                store_sums(builder, totals[m], builder.add(y, builder.mul(_I64(m), y_next)), y_step)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8), generate

    return intrinsic(declare)


# For one input, and for four at once: 24 vectors of sums, as many as registers hold beside what is loaded.
float32_rows, bfloat16_rows, int8_rows = (_float_rows(kind, 1) for kind in (_F32, _I16, _I8))
float32_rows_4, bfloat16_rows_4, int8_rows_4 = (_float_rows(kind, 4) for kind in (_F32, _I16, _I8))


@intrinsic
def int8_code_rows(
    typing: Any, row: Any, step: Any, num_inputs: Any, codes: Any, scales: Any, sums: Any, y: Any, y_step: Any
) -> Any:
    """Rows of int8 by inputs of int8: codes [B, 64], scales [B] fp32 and sums [B, 16] int32 of fours of codes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, step, num_inputs, codes, scales, sums, y, y_step = arguments
        rows, totals = _begin(builder, row, step)
        blocks = builder.sdiv(builder.add(num_inputs, _I64(CODE_BLOCK - 1)), _I64(CODE_BLOCK))
        with cgutils.for_range(builder, blocks) as loop:
            offset = block_of_row(builder, loop.index, CODE_BLOCK, num_inputs)
            inputs, scale, fours = _code_block(builder, loop.index, codes, scales, sums)
            start = builder.sub(ir.Constant(_WORDS, None), builder.shl(fours, ir.Constant(_WORDS, [7] * LANES)))
            for address, total in zip(rows, totals, strict=True):
                fetch(builder, builder.add(address, offset), _I64(AHEAD_BYTES))
                weights = load(builder, builder.add(address, offset), _CODES)
                unsigned = builder.xor(weights, ir.Constant(_CODES, [-128] * CODE_BLOCK))
                exact = builder.sitofp(add_fours(builder, start, unsigned, inputs), _FLOATS)
                builder.store(multiply_add(builder, exact, scale, builder.load(total)), total)
        store_sums(builder, totals, y, y_step)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 8), generate


def _token_rows(count: int) -> Any:
    """The intrinsic for rows of int8 and `count` inputs of int8, each with one scale for all of it.

    (row, step between rows in bytes, inputs' length, codes [B, 64], factors, y, step of y): factors are the scale of an
    input (fp32) and -128 times the sum of its codes (int32); inputs follow each other after `x_step` bytes, their
    factors after 8, their results after `y_next`. What lies `ahead` bytes behind (0: nothing) is asked for.
    """

    def declare(
        typing: Any, row: Any, step: Any, num_inputs: Any, codes: Any, x_step: Any, factors: Any, y: Any, y_step: Any,
        y_next: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, step, num_inputs, codes, x_step, factors, y, y_step, y_next, ahead = arguments
            rows = [builder.add(row, builder.mul(_I64(s), step)) for s in range(STREAMS)]
            places = [builder.add(codes, builder.mul(_I64(m), x_step)) for m in range(count)]
            totals = []
            for m in range(count):
                start = load(builder, builder.add(factors, _I64(8 * m + 4)), _I32)
                first = builder.insert_element(ir.Constant(_WORDS, None), start, _I32(0))
                totals.append([cgutils.alloca_once_value(builder, first) for _ in rows])
            blocks = builder.sdiv(builder.add(num_inputs, _I64(CODE_BLOCK - 1)), _I64(CODE_BLOCK))
            with cgutils.for_range(builder, blocks) as loop:
                offset = block_of_row(builder, loop.index, CODE_BLOCK, num_inputs)
                x_offset = builder.mul(loop.index, _I64(CODE_BLOCK))
                inputs = [load(builder, builder.add(place, x_offset), _CODES) for place in places]
                with builder.if_then(builder.icmp_signed("!=", ahead, _I64(0))):
                    for address in rows:
                        fetch(builder, builder.add(address, offset), ahead)
                for s, address in enumerate(rows):
                    weights = load(builder, builder.add(address, offset), _CODES)
                    unsigned = builder.xor(weights, ir.Constant(_CODES, [-128] * CODE_BLOCK))
                    for m in range(count):
                        total = add_fours(builder, builder.load(totals[m][s]), unsigned, inputs[m])
                        builder.store(total, totals[m][s])
            for m in range(count):
                exact = fold(builder, [builder.load(total) for total in totals[m]])
                scale = load(builder, builder.add(factors, _I64(8 * m)), _F32)
                lanes = exact.type.count
                numbers = builder.fmul(
                    builder.sitofp(exact, ir.VectorType(_F32, lanes)),
                    shuffle(builder, splat(builder, scale), [0] * lanes),
                )
                _store_lanes(builder, numbers, STREAMS, builder.add(y, builder.mul(_I64(m), y_next)), y_step)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 10), generate

    return intrinsic(declare)


int8_token_rows, int8_token_rows_4 = _token_rows(1), _token_rows(4)


def _code_block(builder: Any, index: Any, codes: Any, scales: Any, sums: Any) -> tuple[Any, Any, Any]:
    """A block of inputs: its codes, its scale in all lanes, its sums of fours."""
    inputs = load(builder, builder.add(codes, builder.mul(index, _I64(CODE_BLOCK))), _CODES)
    scale = splat(builder, load(builder, builder.add(scales, builder.mul(index, _I64(4))), _F32))
    fours = load(builder, builder.add(sums, builder.mul(index, _I64(4 * LANES))), _WORDS)
    return inputs, scale, fours


@intrinsic
def int4_code_rows(
    typing: Any, row: Any, step: Any, num_blocks: Any, w_scales: Any, w_scales_step: Any, codes: Any, scales: Any,
    sums: Any, y: Any, y_step: Any,
) -> Any:  # fmt: skip
    """Rows of 4 bits by inputs of int8, two blocks of inputs at a time, none overlapping.

    64 bytes hold 128 numbers: byte j w[j] + 8 low and w[j + 64] + 8 high. `w_scales`: fp16, one for 32 numbers.
    """
    pair, four = ir.VectorType(_F32, 2), ir.VectorType(_F32, 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, step, num_blocks, w_scales, w_scales_step, codes, scales, sums, y, y_step = arguments
        rows, totals = _begin(builder, row, step)
        scale_rows = [builder.add(w_scales, builder.mul(_I64(s), w_scales_step)) for s in range(STREAMS)]
        low_bits = ir.Constant(_CODES, [15] * CODE_BLOCK)
        with cgutils.for_range(builder, num_blocks) as loop:
            offset, scale_offset = builder.mul(loop.index, _I64(CODE_BLOCK)), builder.mul(loop.index, _I64(8))
            first = builder.mul(loop.index, _I64(2))
            blocks = [_code_block(builder, builder.add(first, _I64(i)), codes, scales, sums) for i in range(2)]
            starts = [
                builder.sub(ir.Constant(_WORDS, None), builder.shl(fours, ir.Constant(_WORDS, [3] * LANES)))
                for _, _, fours in blocks
            ]
            # Input scales as the four scales of a row lie: one for 32 numbers.
            x_scales = load(builder, builder.add(scales, builder.mul(first, _I64(4))), pair)
            x_scales = shuffle(builder, x_scales, [0, 0, 1, 1])
            for address, scale_row, total in zip(rows, scale_rows, totals, strict=True):
                fetch(builder, builder.add(address, offset), _I64(AHEAD_BYTES))
                packed = load(builder, builder.add(address, offset), _CODES)
                stored = load(builder, builder.add(scale_row, scale_offset), ir.VectorType(_F16, 4))
                factors = builder.fmul(builder.fpext(stored, four), x_scales)
                high = builder.lshr(packed, ir.Constant(_CODES, [4] * CODE_BLOCK))
                for i, weights in enumerate((builder.and_(packed, low_bits), high)):
                    exact = builder.sitofp(add_fours(builder, starts[i], weights, blocks[i][0]), _FLOATS)
                    lanes = shuffle(builder, factors, [2 * i] * 8 + [2 * i + 1] * 8)
                    builder.store(multiply_add(builder, exact, lanes, builder.load(total)), total)
        store_sums(builder, totals, y, y_step)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 10), generate
