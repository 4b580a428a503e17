"""Attention of single new tokens over a paged cache, nothing copied. Imports Numba (see `compiled.py`).

A unit of work is one request, one split of its keys, and a range of query heads. All heads of a tile of keys are done
before the next tile: the heads of a slot lie side by side, so that the pool is read in long runs (head by head, a cache
of 8 heads and 8192 keys took ten times as long). Memory is asked for in the order in which it lies, half a tile's work
ahead; `heads_loops.py` does the arithmetic. Splits begin at fixed places and are merged in order, and ranges of heads
share no sum: the bits of a row depend on its own keys alone.

Shapes as in `paged_attention/op.py`; G query heads of a unit, T keys of a tile, A tokens, U splits. The pools come as
flat arrays, in which the strides of `layout` (block, slot, head, in numbers) find a key or a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.compiled import exact, parallel, serial
from trine.kernels.cpu.heads_loops import (
    QUERIES,
    add_four,
    add_one,
    add_two,
    fetch_rows,
    score_four,
    score_one,
    score_two,
)
from trine.kernels.cpu.numbers_loops import dot, exponential, widen
from trine.kernels.cpu.vector_loops import LANES

# Keys whose weights are formed together, and keys of a split (a multiple of the former).
TILE = 32
SPLIT = 512


@serial
def find_keys(table_M: Any, first_key: int, layout: Any, at_T3: Any) -> None:
    """Where the slots from `first_key` on lie: (place of their scales, of their keys, of their values)."""
    block_size, num_kv_heads, k_block, k_slot, _, v_block, v_slot, _ = layout
    entry, slot = first_key // block_size, first_key % block_size
    block = np.int64(table_M[entry])
    for t in range(at_T3.shape[0]):
        if slot == block_size:
            entry, slot = entry + 1, 0
            block = np.int64(table_M[entry])
        at_T3[t, 0] = (block * block_size + slot) * num_kv_heads
        at_T3[t, 1] = block * k_block + slot * k_slot
        at_T3[t, 2] = block * v_block + slot * v_slot
        slot += 1


@serial
def score_keys(q_GD: Any, heads: Any, k: Any, k_scales: Any, k_head: int, at_T3: Any, options: Any, s_GT: Any) -> None:
    """The scores of every query with every key, capped. `heads`: (first query head, query heads of a key's)."""
    first, group = heads
    scale, softcap = options
    G, D = q_GD.shape
    whole = D // LANES * LANES
    for head in range(first // group, (first + G - 1) // group + 1):
        g, end = max(0, head * group - first), min(G, (head + 1) * group - first)
        while g < end:
            count = queries_at_once(end - g)
            if count == QUERIES:
                score_four(k, at_T3[:, 1], head * k_head, q_GD, g, s_GT)
            elif count == 2:
                score_two(k, at_T3[:, 1], head * k_head, q_GD, g, s_GT)
            else:
                score_one(k, at_T3[:, 1], head * k_head, q_GD, g, s_GT)
            for row in range(g, g + count):
                s_T = s_GT[row]
                for t in range(TILE if whole < D else 0):
                    place = at_T3[t, 1] + head * k_head
                    s_T[t] += dot(k[place + whole : place + D], q_GD[row, whole:])
                for t in range(TILE):
                    s_T[t] *= scale
                for t in range(TILE if k_scales.shape[0] > 0 else 0):
                    s_T[t] *= k_scales[at_T3[t, 0] + head]
                for t in range(TILE if softcap > 0 else 0):
                    s_T[t] = softcap * np.tanh(s_T[t] / softcap)
            g += count


@serial
def queries_at_once(left: int) -> Any:
    """How many of the queries that are left meet a key together; their sums do not depend on it."""
    return QUERIES if left >= QUERIES else (2 if left >= 2 else 1)


@exact
def largest_of(scores_T: Any, half_T: Any) -> Any:
    """The largest score, found by halves, which vectors can do. NaN is passed over."""
    width = TILE // 2
    for t in range(width):
        half_T[t] = scores_T[t] if scores_T[t] > scores_T[t + width] else scores_T[t + width]
    while width > 1:
        width //= 2
        for t in range(width):
            half_T[t] = half_T[t] if half_T[t] > half_T[t + width] else half_T[t + width]
    return half_T[0]


@serial
def weigh(scores_T: Any, count: int, half_T: Any, largest: float, total: float, o_D: Any) -> Any:
    """Turn scores into weights, relative to the largest so far; what was summed before shrinks. (largest, total).

    From `count` on the weights are next to nothing (2^-126), and add nothing to a total that is 1 or more.
    """
    before = largest
    scores_T[count:] = -np.inf
    found = largest_of(scores_T, half_T)
    largest = found if found > largest else largest
    if largest > before:
        shrink = exponential(before - largest)
        total *= shrink
        for d in range(o_D.shape[0]):
            o_D[d] *= shrink
    added = np.float32(0)
    for t in range(TILE):
        scores_T[t] = exponential(scores_T[t] - largest)
        added += scores_T[t]
    return largest, total + added


@serial
def add_values(weights_GT: Any, heads: Any, v: Any, v_scales: Any, v_head: int, at_T3: Any, o_GD: Any) -> None:
    """o += weights times values; the weights are scaled where values are."""
    first, group = heads
    G, D = o_GD.shape
    whole = D // LANES * LANES
    for head in range(first // group, (first + G - 1) // group + 1):
        g, end = max(0, head * group - first), min(G, (head + 1) * group - first)
        for row in range(g, end if v_scales.shape[0] > 0 else g):
            for t in range(at_T3.shape[0]):
                weights_GT[row, t] *= v_scales[at_T3[t, 0] + head]
        while g < end:
            count = queries_at_once(end - g)
            if count == QUERIES:
                add_four(v, at_T3[:, 2], head * v_head, weights_GT, g, o_GD)
            elif count == 2:
                add_two(v, at_T3[:, 2], head * v_head, weights_GT, g, o_GD)
            else:
                add_one(v, at_T3[:, 2], head * v_head, weights_GT, g, o_GD)
            for row in range(g, g + count if whole < D else g):
                for t in range(at_T3.shape[0]):
                    place = at_T3[t, 2] + head * v_head
                    for d in range(whole, D):
                        o_GD[row, d] += weights_GT[row, t] * widen(v[place + d])
            g += count


@serial
def fetch_keys(pool: Any, q_GD: Any, heads: Any, step: int, places_T: Any) -> None:
    """Have the keys or values of a tile read ahead, in the order in which they lie. `step`: from head to head."""
    first, group = heads
    (G, D), head = q_GD.shape, first // group
    num_heads = (first + G - 1) // group - head + 1
    if step == D:
        fetch_rows(pool, places_T, head * step, num_heads * D)
    else:
        for i in range(num_heads):
            fetch_rows(pool, places_T, (head + i) * step, D)


@serial
def add_relative(scores_GT: Any, first: int, relative: Any, first_key: int, count: int) -> None:
    """Add what the distance of a key adds to its scores."""
    bias_HW, newest = relative
    W = bias_HW.shape[1]
    for g in range(scores_GT.shape[0] if W > 0 else 0):
        for t in range(count):
            scores_GT[g, t] += bias_HW[first + g, min(newest - first_key - t, W - 1)]


@serial
def attend_split(
    q_GD: Any, heads: Any, pools: Any, layout: Any, table_M: Any, begin: int, end: int, options: Any, relative: Any,
    part: Any,
) -> None:  # fmt: skip
    """The unnormalised sum over the keys begin <= key < end into `part`: (o_GD, largest_G, total_G).

    relative: (what is added to the scores of each head by the distance of a key, the last for all beyond: [H, W], or
    nothing: W = 0; the key that distances are counted from).
    """
    k, v, k_scales, v_scales = pools
    o_GD, largest_G, total_G = part
    # Places of this tile's keys and of the next one's, whose memory is asked for a tile ahead.
    at_T3, next_T3 = np.empty((TILE, 3), np.int64), np.empty((TILE, 3), np.int64)
    coming = max(0, min(TILE, end - begin))
    if coming > 0:
        find_keys(table_M, begin, layout, next_T3[:coming])
        fetch_keys(k, q_GD, heads, layout[4], next_T3[:coming, 1])
    scores_GT, half_T = np.empty((q_GD.shape[0], TILE), np.float32), np.empty(TILE // 2, np.float32)
    o_GD[:] = 0
    largest_G[:] = -np.inf
    total_G[:] = 0
    for first_key in range(begin, end, TILE):
        at_T3, next_T3 = next_T3, at_T3
        count, coming = coming, max(0, min(TILE, end - first_key - TILE))
        fetch_keys(v, q_GD, heads, layout[7], at_T3[:count, 2])
        at_T3[count:] = at_T3[count - 1]  # whole vectors of scores; what is past the last key gets no weight
        score_keys(q_GD, heads, k, k_scales, layout[4], at_T3, options, scores_GT)
        add_relative(scores_GT, heads[0], relative, first_key, count)
        for g in range(q_GD.shape[0]):
            largest_G[g], total_G[g] = weigh(scores_GT[g], count, half_T, largest_G[g], total_G[g], o_GD[g])
        if coming > 0:
            find_keys(table_M, first_key + TILE, layout, next_T3[:coming])
            fetch_keys(k, q_GD, heads, layout[4], next_T3[:coming, 1])
        add_values(scores_GT, heads, v, v_scales, layout[7], at_T3[:count], o_GD)


@serial
def merge(o_UD: Any, largest_U: Any, total_U: Any, sink: Any, o_D: Any) -> None:
    """Add up one head of all splits in order, and its sink (one number or none), and normalise."""
    largest = sink[0] if sink.shape[0] > 0 else np.float32(-np.inf)
    for u in range(o_UD.shape[0]):
        largest = largest_U[u] if largest_U[u] > largest else largest
    total = exponential(sink[0] - largest) if sink.shape[0] > 0 else np.float32(0)
    o_D[:] = 0
    for u in range(o_UD.shape[0]):
        if total_U[u] == 0:  # a split without visible keys
            continue
        shrink = exponential(largest_U[u] - largest)
        total += total_U[u] * shrink
        for d in range(o_D.shape[0]):
            o_D[d] += o_UD[u, d] * shrink
    for d in range(o_D.shape[0]):
        o_D[d] /= total


@serial
def visible(length: int, window: int) -> Any:
    """The first key that the newest token sees (window < 0: all), and the split that it lies in."""
    first = max(0, length - 1 - window) if window >= 0 else 0
    return first, first // SPLIT


@parallel
def attend(
    q_NHD: Any, pools: Any, layout: Any, table_RM: Any, lengths_R: Any, queries_A2: Any, options: Any, window: int,
    sinks_H: Any, o_NHD: Any, num_threads: int,
) -> None:  # fmt: skip
    """o of the tokens queries_A2[:, 1], each the newest of the request queries_A2[:, 0]. q, o and sinks in fp32.

    `pools`: (k, v, their scales or empty arrays). `layout`: (slots of a block, key/value heads, the three strides of k,
    those of v). `options`: (scale, softcap or 0). `window` < 0: none. `num_threads` decides how work is cut and nothing
    about what is summed.
    """
    A, H, D = queries_A2.shape[0], q_NHD.shape[1], q_NHD.shape[2]
    num_splits = 0
    for a in range(A):
        length = lengths_R[queries_A2[a, 0]]
        num_splits = max(num_splits, (length + SPLIT - 1) // SPLIT - visible(length, window)[1])
    # Ranges of heads only where there is too little else to share among the threads.
    num_ranges = min(H, max(1, -(-2 * num_threads // max(1, A * num_splits))))
    size = -(-H // num_ranges)
    o_AUHD = np.empty((A, num_splits, H, D), np.float32)
    largest_AUH = np.empty((A, num_splits, H), np.float32)
    total_AUH = np.empty((A, num_splits, H), np.float32)
    for unit in prange(A * num_splits * num_ranges):
        a, split, first = unit // num_ranges // num_splits, unit // num_ranges % num_splits, unit % num_ranges * size
        request, token = queries_A2[a, 0], queries_A2[a, 1]
        last = min(H, first + size)
        if first < last:
            first_key, first_split = visible(lengths_R[request], window)
            begin = max(first_key, (first_split + split) * SPLIT)
            end = min(lengths_R[request], (first_split + split + 1) * SPLIT)
            part = (o_AUHD[a, split, first:last], largest_AUH[a, split, first:last], total_AUH[a, split, first:last])
            heads = (first, H // layout[1])
            none = (np.empty((0, 0), np.float32), 0)
            attend_split(
                q_NHD[token, first:last], heads, pools, layout, table_RM[request], begin, end, options, none, part
            )
    for row in prange(A * H):
        a, h = row // H, row % H
        o_D = o_NHD[queries_A2[a, 1], h]
        merge(o_AUHD[a, :, h], largest_AUH[a, :, h], total_AUH[a, :, h], sinks_H[h : h + 1], o_D)
