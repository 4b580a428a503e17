"""One tile of attention: what the forward and all backward passes compute alike.

A tile may be queries by keys or keys by queries: what belongs to queries and what belongs to keys comes in shapes that
broadcast to it, [M, 1] and [1, N] or [1, M] and [N, 1]. Exponentials are powers of two: scores times `unit` are in
units of log2, and exp2(scores * unit - top) is one fused multiply-add and one exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Philox with 7 rounds is the shortest that passes every statistical test (Salmon et al. 2011); usual are 10.
ROUNDS = tl.constexpr(7)


@triton.jit
def query_bounds(low_ptr, high_ptr, queries, num_queries, num_keys, CAUSAL: tl.constexpr):
    """(low, high) of queries; without tensors those of a causal or full mask. Rows past the end repeat the last."""
    inside = tl.minimum(queries, num_queries - 1)
    if low_ptr is None:
        low = inside * 0
        high = inside + 1 if CAUSAL else low + num_keys
    else:
        low = tl.load(low_ptr + inside)
        high = tl.load(high_ptr + inside)
    return low, high


@triton.jit
def query_places(position_ptr, queries, num_queries):
    """Where queries stand among the keys, for ALiBi: at their own number where no tensor tells it."""
    places = queries
    if position_ptr is not None:
        places = tl.load(position_ptr + tl.minimum(queries, num_queries - 1))
    return places


@triton.jit
def load_tile(
    ptr, row, stride, num_rows, EDGE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """ROWS rows of one head from `row` on, [ROWS, BLOCK_D]; zeros past HEAD_DIM, and past the end where EDGE says so.

    The offset of the tile is one 64-bit number; within it 32 bits are enough (`options.readable`), which saves
    registers.
    """
    steps = tl.arange(0, ROWS)
    channels_D = tl.arange(0, BLOCK_D)
    places = ptr + tl.cast(row, tl.int64) * stride + (steps[:, None] * stride + channels_D[None, :])
    if EDGE and HEAD_DIM < BLOCK_D:
        x = tl.load(places, mask=(steps < num_rows - row)[:, None] & (channels_D < HEAD_DIM)[None, :], other=0.0)
    elif EDGE:
        x = tl.load(places, mask=(steps < num_rows - row)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(places, mask=(channels_D < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(places)
    return x


@triton.jit
def store_tile(ptr, x, row, stride, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `load_tile` would read."""
    steps = tl.arange(0, ROWS)
    channels_D = tl.arange(0, BLOCK_D)
    places = ptr + tl.cast(row, tl.int64) * stride + (steps[:, None] * stride + channels_D[None, :])
    inside = (steps < num_rows - row)[:, None] & (channels_D < HEAD_DIM)[None, :]
    tl.store(places, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def between(x, low, high):
    """low <= x < high, where low <= high: one comparison, for below low the difference wraps around."""
    return (x - low).to(tl.uint32, bitcast=True) < (high - low).to(tl.uint32, bitcast=True)


@triton.jit
def tanh(x):
    """By exp2, without a library call: absolute error about 1e-7."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def tile_scores(
    product, queries, places, keys, slope, bias_ptr, scale, softcap, num_queries, num_keys,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(scores, unit, d(capped score)/d(score)) from the products q k^T, not masked."""
    slack = 1.0
    if SOFTCAP:
        scores = tanh(product * (scale / softcap))
        slack = 1.0 - scores * scores
        unit = softcap * LOG2E
    else:
        scores = product
        unit = scale * LOG2E
    if ALIBI or BIAS:
        scores *= unit
        unit = 1.0
        if ALIBI:
            scores += (slope * LOG2E) * (keys - places).to(tl.float32)
        if BIAS:
            entry = keys - queries + (num_queries - 1)
            inside = (entry >= 0) & (entry < num_queries + num_keys - 1)
            scores += tl.load(bias_ptr + entry, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return scores, unit, slack


@triton.jit
def keep_factors(seed, plane, queries, keys, drop):
    """1 / (1 - drop) where a weight is kept and 0 where it is dropped: Philox of its place alone.

    `plane` is row of the batch * heads + head.
    """
    nothing = queries * 0 + keys * 0
    draw, _, _, _ = tl.philox(seed, keys + nothing, queries + nothing, plane + nothing, nothing, ROUNDS)
    # 24 bits are what fp32 holds exactly.
    uniform = (draw >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= drop, 1.0 / (1.0 - drop), 0.0)
