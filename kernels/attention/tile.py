"""The scores of one tile of attention: shared by the forward and both backward passes.

Scores are in units of log2, so that exp2 can be used. Query t sees the keys low[t] <= s < high[t] (`op.py`); a caller
says by MASKED whether a tile can hold others. A tile may be queries by keys or keys by queries: what belongs to queries and
what belongs to keys comes in shapes that broadcast to it, [M, 1] and [1, N] or [1, M] and [N, 1].
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """By exp2, without a library call: absolute error about 1e-7."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def tile_scores(
    product,
    queries,
    keys,
    low,
    high,
    slope,
    bias_ptr,
    scale,
    softcap,
    num_queries,
    num_keys,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Masked scores in log2 units of the products q k^T, and d(capped score)/d(score) (1 without softcap)."""
    slack = 1.0
    if SOFTCAP:
        capped = tanh(product * (scale / softcap))
        scores = capped * (softcap * LOG2E)
        slack = 1.0 - capped * capped
    else:
        scores = product * (scale * LOG2E)
    if ALIBI:
        scores += (slope * LOG2E) * (keys - queries).to(tl.float32)
    if BIAS:
        entry = keys - queries + (num_queries - 1)
        inside = (entry >= 0) & (entry < num_queries + num_keys - 1)
        scores += tl.load(bias_ptr + entry, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        visible = (keys >= low) & (keys < high)
        scores = tl.where(visible, scores, float("-inf"))
    return scores, slack


@triton.jit
def keep_factors(seed, rows, keys, drop, DROPOUT: tl.constexpr):
    """1 / (1 - drop) where a weight is kept and 0 where it is dropped, from its place alone (Philox).

    `rows` (int64): (row of the batch * heads + head) * queries + query, times the keys.
    """
    draw = tl.rand(seed, rows + keys)
    return tl.where(draw >= drop, 1.0 / (1.0 - drop), 0.0)
