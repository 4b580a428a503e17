"""Products of a few rows with a range of a weight's rows, by one thread. Imports Numba (see `compiled.py`).

Inputs are prepared once for all rows of a weight (`prepare`): cut into blocks, and rounded to int8 where the weight's
codes are multiplied as they are. They are with a scale for every 64 inputs, an error about that of the weight's own
rounding to 8 bits, or with one for the row, where that is what a quantized model asks for. Those of float8 become
float8 numbers, with a scale for the row or for every 128 of them (`float8_loops.py`).

A projection is fourteen int64 (`FIELDS`); `prepare` and `multiply_range` are called by address.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trine.kernels.cpu.compiled import callback, serial
from trine.kernels.cpu.dots_loops import round_rows
from trine.kernels.cpu.float8_loops import GROUP, laid_bytes, round_float8, sum_float8
from trine.kernels.cpu.memory_loops import bytes_at, call_with, floats, longs, shorts, words
from trine.kernels.cpu.numbers_loops import add_product, dot
from trine.kernels.cpu.quantize import LIMIT, SMALLEST_SCALE
from trine.kernels.cpu.quantize_loops import quantize_row, scale_of
from trine.kernels.cpu.rounding_loops import round_block
from trine.kernels.cpu.vector_loops import (
    AHEAD_BYTES,
    CODE_BLOCK,
    FLOAT_BLOCK,
    LANES,
    STREAMS,
    bfloat16_rows,
    bfloat16_rows_4,
    float32_rows,
    float32_rows_4,
    int4_code_rows,
    int8_code_rows,
    int8_rows,
    int8_rows_4,
    int8_token_rows,
    int8_token_rows_4,
)

# Kinds of weights. Those of codes are multiplied by inputs of int8, `INT8_TOKENS` with one scale a row. `TILES` and
# `DOTS` are the layout "lanes" (`codes.py`), multiplied by the function at `multiply`, as fp32 or as whole numbers.
# Scales of `FLOAT8` are those of its codes over 2^8: `groups` in a line, which `chunk` outputs share.
FLOAT32, BFLOAT16, INT8, FLOAT8, TILES, DOTS, INT8_CODES, INT8_TOKENS, INT4_CODES = range(9)
# The longest chunk of a row of lanes.
LONGEST_CHUNK = 128
# What describes a projection. Addresses of what is not there are 0; steps are in bytes. From `multiply` on: of lanes.
FIELDS = (
    "kind", "weight", "outputs", "inputs", "step", "scales", "scales_step", "bias",
    "multiply", "zeros", "scales_kind", "chunk", "groups", "bits",
)  # fmt: skip
(
    KIND, WEIGHT, OUTPUTS, INPUTS, STEP, SCALES, SCALES_STEP, BIAS, MULTIPLY_LANES, ZEROS, SCALES_KIND, CHUNK, GROUPS,
    BITS,
) = range(len(FIELDS))  # fmt: skip


@serial
def unit_of(kind: int) -> int:
    """Outputs that are computed together, of which a thread takes whole ones."""
    return LANES if kind in (TILES, DOTS) else STREAMS


@serial
def blocks_of(kind: int, num_inputs: int) -> Any:
    """(blocks, numbers of a block) of the inputs of a projection; 4 bits take blocks in pairs."""
    if kind == INT4_CODES:
        return (num_inputs + 2 * CODE_BLOCK - 1) // (2 * CODE_BLOCK) * 2, CODE_BLOCK
    size = CODE_BLOCK if kind >= INT8_CODES else FLOAT_BLOCK
    return (num_inputs + size - 1) // size, size


@serial
def prepared_bytes(kind: int, num_inputs: int) -> Any:
    """Bytes of one prepared row."""
    if kind in (TILES, DOTS):
        return 4 * ((num_inputs + LONGEST_CHUNK - 1) // LONGEST_CHUNK * LONGEST_CHUNK)
    if kind == FLOAT8:
        return laid_bytes(num_inputs) + 4 * ((num_inputs + GROUP - 1) // GROUP)
    blocks, size = blocks_of(kind, num_inputs)
    return blocks * (size + 4 + 4 * LANES) if kind >= INT8_CODES else 4 * blocks * size


@serial
def cut(x_K: Any, first: int, begin: int, block_S: Any) -> None:
    """The inputs from `begin` on, of those from `first` on; 0 before and beyond."""
    for j in range(block_S.shape[0]):
        k = first + j
        block_S[j] = 0
        if begin <= k < x_K.shape[0]:
            block_S[j] = x_K[k]


@serial
def fill_chunks(x: Any, num_inputs: int, chunk: int, place: int) -> None:
    """Rows filled up with zeros to whole chunks, where they are not already (those are read as they are)."""
    filled = (num_inputs + chunk - 1) // chunk * chunk
    if filled == num_inputs:
        return
    rows = floats(place, x.shape[0] // num_inputs * filled)
    for m in range(x.shape[0] // num_inputs):
        for k in range(filled):
            rows[m * filled + k] = x[m * num_inputs + k] if k < num_inputs else np.float32(0)


@serial
def round_tokens(x: Any, num_inputs: int, place: int) -> None:
    """Codes of whole rows, in blocks [M, B, 64], and behind all of them the factors of each (`vector_loops.py`)."""
    M, width = x.shape[0] // num_inputs, (num_inputs + CODE_BLOCK - 1) // CODE_BLOCK * CODE_BLOCK
    rounded_K = np.empty(num_inputs, np.int8)
    for m in range(M):
        x_K = x[m * num_inputs : (m + 1) * num_inputs]
        scale = scale_of(x_K, LIMIT, SMALLEST_SCALE)
        quantize_row(x_K, scale, LIMIT, rounded_K)
        lay_token(rounded_K, bytes_at(place + m * width, width))
        factors = place + M * width + 8 * m
        floats(factors, 1)[0] = scale
        words(factors + 4, 1)[0] = np.int32(-128) * sum_codes(rounded_K)


@serial
def lay_token(codes_K: Any, blocks: Any) -> None:
    """A row of codes in whole blocks, of which the last ends with the row and begins with zeros."""
    whole, width = codes_K.shape[0] // CODE_BLOCK * CODE_BLOCK, blocks.shape[0]
    for k in range(whole):
        blocks[k] = codes_K[k]
    for k in range(whole, width):
        place = k - width + codes_K.shape[0]
        blocks[k] = codes_K[place] if place >= whole else np.int8(0)


@serial
def sum_codes(codes_K: Any) -> Any:
    """Their sum in int32."""
    total = np.int32(0)
    for k in range(codes_K.shape[0]):
        total = add_product(total, codes_K[k], np.int8(1))
    return total


@serial
def sum_tokens(
    row: int, step: int, num_inputs: int, codes: int, width: int, factors: int, num_rows: int, y: int, y_step: int,
    apart: int, ahead: int,
) -> None:  # fmt: skip
    """`STREAMS` rows of int8, `step` bytes from each other, by inputs as `round_tokens` leaves them.

    Results of a row of inputs lie `apart` numbers from each other, those of the next one `y_step` bytes on.
    """
    m = 0
    while m < num_rows:
        x, own, to = codes + m * width, factors + 8 * m, y + m * y_step
        if num_rows - m >= 4:
            # What the first rows have asked for is there for the others, while it is in the first cache.
            beyond = ahead if m == 0 or num_rows <= 16 else 0
            int8_token_rows_4(row, step, num_inputs, x, width, own, to, 4 * apart, y_step, beyond)
            m += 4
        else:
            int8_token_rows(row, step, num_inputs, x, width, own, to, 4 * apart, y_step, ahead)
            m += 1


@callback("void(int64, int64, int64, int64)")
def prepare(fields: int, x: int, num_rows: int, place: int) -> None:
    """Blocks of the rows at x (fp32, [M, K]) to `place`: numbers; or codes [M, B, 64], scales [M, B], sums [M, B, 16].

    The last block ends with the row (4 bits: is filled up), so that no weight is read beyond its row. Of lanes:
    whole rows, filled up to chunks, or rounded (`dots_loops.py`). Of int8 with one scale a row: `round_tokens`. Of
    float8: `float8_loops.round_float8`.
    """
    projection = longs(fields, len(FIELDS))
    kind, K = projection[KIND], projection[INPUTS]
    if kind == TILES:
        fill_chunks(floats(x, num_rows * K), K, projection[CHUNK], place)
        return
    if kind == DOTS:
        round_rows(floats(x, num_rows * K), K, projection[CHUNK], projection[BITS], place)
        return
    if kind == INT8_TOKENS:
        round_tokens(floats(x, num_rows * K), K, place)
        return
    if kind == FLOAT8:
        round_float8(x, num_rows, K, projection[GROUPS], place)
        return
    if kind < INT4_CODES and K < CODE_BLOCK:
        return  # read as they are
    blocks, size = blocks_of(kind, K)
    if kind < INT8_CODES and K % size == 0:
        return  # so are these
    x_MK = floats(x, num_rows * K)
    scales = floats(place + num_rows * blocks * size, num_rows * blocks)
    sums = place + num_rows * blocks * (size + 4)
    part_S = np.empty(size, np.float32)
    for m in range(num_rows):
        x_K = x_MK[m * K : (m + 1) * K]
        for b in range(blocks):
            begin = b * size
            first = min(begin, K - size) if kind != INT4_CODES else begin
            at = m * blocks + b
            if kind < INT8_CODES:
                cut(x_K, first, begin, floats(place + 4 * at * size, size))
                continue
            source = x + 4 * (m * K + begin)
            if begin + size > K:
                cut(x_K, first, begin, part_S)
                source = part_S.ctypes.data
            scales[at] = round_block(source, place + at * size, sums + 4 * LANES * at)


@serial
def sum_plain(projection: Any, x: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """The sums of rows that are shorter than a block."""
    kind, K = projection[KIND], projection[INPUTS]
    for n in range(begin, end):
        row = projection[WEIGHT] + n * projection[STEP]
        for m in range(num_rows):
            x_K = floats(x + 4 * m * K, K)
            if kind == FLOAT32:
                total = dot(floats(row, K), x_K)
            elif kind == BFLOAT16:
                total = dot(shorts(row, K), x_K)
            else:
                total = dot(bytes_at(row, K), x_K)
            floats(y + m * y_step + 4 * n, 1)[0] = total


@serial
def sum_streams(projection: Any, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int) -> None:
    """The sums of rows in `STREAMS` ranges of one length, at equal distances: they overlap where rows are left over."""
    kind, K, step = projection[KIND], projection[INPUTS], projection[STEP]
    blocks, size = blocks_of(kind, K)
    apart = (end - begin) // STREAMS
    for n in range(begin, end - apart * (STREAMS - 1)):
        row, place, m = projection[WEIGHT] + n * step, y + 4 * n, 0
        if kind == INT8_TOKENS:
            width = blocks * size
            sum_tokens(
                row,
                apart * step,
                K,
                prepared,
                width,
                prepared + num_rows * width,
                num_rows,
                place,
                y_step,
                apart,
                AHEAD_BYTES,
            )
            continue
        while m < num_rows:
            to, at = place + m * y_step, m * blocks
            if kind < INT8_CODES:
                x, x_step = prepared + 4 * at * size, 4 * blocks * size
                if num_rows - m >= 4:
                    if kind == FLOAT32:
                        float32_rows_4(row, apart * step, K, x, x_step, to, 4 * apart, y_step)
                    elif kind == BFLOAT16:
                        bfloat16_rows_4(row, apart * step, K, x, x_step, to, 4 * apart, y_step)
                    else:
                        int8_rows_4(row, apart * step, K, x, x_step, to, 4 * apart, y_step)
                    m += 4
                    continue
                if kind == FLOAT32:
                    float32_rows(row, apart * step, K, x, x_step, to, 4 * apart, y_step)
                elif kind == BFLOAT16:
                    bfloat16_rows(row, apart * step, K, x, x_step, to, 4 * apart, y_step)
                else:
                    int8_rows(row, apart * step, K, x, x_step, to, 4 * apart, y_step)
                m += 1
                continue
            codes = prepared + at * size
            scales = prepared + num_rows * blocks * size + 4 * at
            sums = prepared + num_rows * blocks * (size + 4) + 4 * LANES * at
            if kind != INT4_CODES:
                int8_code_rows(row, apart * step, K, codes, scales, sums, to, 4 * apart)
            else:
                w_scales, w_step = projection[SCALES] + n * projection[SCALES_STEP], projection[SCALES_STEP]
                int4_code_rows(
                    row, apart * step, blocks // 2, w_scales, apart * w_step, codes, scales, sums, to, 4 * apart
                )
            m += 1


@callback("void(int64, int64, int64, int64, int64, int64, int64, int64)")
def multiply_range(
    fields: int, x: int, prepared: int, num_rows: int, begin: int, end: int, y: int, y_step: int
) -> None:
    """y[m, n] = sum_k w[n, k] x[m, k] (scaled) + bias[n] for begin <= n < end; rows of y are `y_step` bytes apart."""
    projection = longs(fields, len(FIELDS))
    if projection[KIND] in (TILES, DOTS):
        call_with(projection[MULTIPLY_LANES], (fields, x, prepared, num_rows, begin, end, y, y_step))
    elif projection[KIND] < INT4_CODES and projection[INPUTS] < CODE_BLOCK:
        sum_plain(projection, x, num_rows, begin, end, y, y_step)
    elif projection[KIND] == FLOAT8:
        K, groups = projection[INPUTS], projection[GROUPS]
        weight = (projection[WEIGHT], K, projection[SCALES], groups, projection[CHUNK])
        sum_float8(weight, prepared, prepared + num_rows * laid_bytes(K), num_rows, begin, end, y, y_step)
    else:
        whole = projection[KIND] < INT8_CODES and projection[INPUTS] % FLOAT_BLOCK == 0
        sum_streams(projection, x if whole else prepared, num_rows, begin, end, y, y_step)
    scaled = projection[KIND] in (INT8, INT8_CODES, INT8_TOKENS)
    for m in range(num_rows):
        y_N = floats(y + m * y_step + 4 * begin, end - begin)
        if scaled:
            scales_N = floats(projection[SCALES] + 4 * begin, end - begin)
            for n in range(end - begin):
                y_N[n] *= scales_N[n]
        if projection[BIAS] != 0:
            bias_N = floats(projection[BIAS] + 4 * begin, end - begin)
            for n in range(end - begin):
                y_N[n] += bias_N[n]
