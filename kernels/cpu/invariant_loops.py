"""Attention with one order over the keys, whatever else is computed beside a row. Imports Numba (see `compiled.py`).

A row is one query head of one token. It takes the keys that it sees in tiles of `TILE`, which begin at multiples of
`TILE` from its sequence's first key on, and no sum is reordered:

    score[t] = q[0] k[t, 0] + q[1] k[t, 1] + ...        a chain over the channels (`chains_loops.add_rows`)
    o[d] = (o[d] shrink + p[0] v[0, d]) + p[1] v[1, d] + ...        likewise over the keys
    total: one sum for each place in a tile, all of them added up by halves at the end

So vectors lie along keys or channels, never along a sum, and how many rows share a tile (which is loaded, and
transposed, once for all of them) does not occur in the bits of a row.

Shapes: N tokens, H query heads, D head dimension, T keys of a tile, M rows of a unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from trine.kernels.cpu.attention_loops import find_keys
from trine.kernels.cpu.chains_loops import LANES, add_rows
from trine.kernels.cpu.compiled import exact, parallel
from trine.kernels.cpu.numbers_loops import exponential, widen

# Keys of a tile: four vectors, so that there are chains enough to work on side by side.
TILE = 64


@exact
def load_keys(k: Any, scales: Any, head: int, k_head: int, at_T3: Any, keys_DT: Any) -> None:
    """The keys of a tile in fp32, channel by channel; zeros past the last."""
    count = at_T3.shape[0]
    for t in range(count):
        place = at_T3[t, 1] + head * k_head
        factor = scales[at_T3[t, 0] + head] if scales.shape[0] > 0 else np.float32(1)
        for d in range(keys_DT.shape[0]):
            keys_DT[d, t] = widen(k[place + d]) * factor
    for d in range(keys_DT.shape[0]):
        for t in range(count, TILE):
            keys_DT[d, t] = np.float32(0)


@exact
def load_values(v: Any, scales: Any, head: int, v_head: int, at_T3: Any, D: int, values_TD: Any) -> None:
    """The values of a tile in fp32; the rest of a row is kept."""
    for t in range(at_T3.shape[0]):
        place = at_T3[t, 2] + head * v_head
        factor = scales[at_T3[t, 0] + head] if scales.shape[0] > 0 else np.float32(1)
        for d in range(D):
            values_TD[t, d] = widen(v[place + d]) * factor


@exact
def largest(s_T: Any, half_T: Any) -> Any:
    """The largest score, found by halves."""
    width = TILE // 2
    for t in range(width):
        half_T[t] = s_T[t] if s_T[t] > s_T[t + width] else s_T[t + width]
    while width > 1:
        width //= 2
        for t in range(width):
            half_T[t] = half_T[t] if half_T[t] > half_T[t + width] else half_T[t + width]
    return half_T[0]


@exact
def weigh(s_T: Any, begin: int, end: int, options: Any, top: Any, o_D: Any, sums_T: Any, half_T: Any) -> Any:
    """Scores into weights of the keys begin <= t < end, 0 elsewhere; sums and o shrink. The new top."""
    scale, softcap = options
    for t in range(TILE):
        s_T[t] = s_T[t] * scale
    if softcap > 0:
        for t in range(TILE):
            s_T[t] = softcap * np.tanh(s_T[t] / softcap)
    s_T[:begin] = np.float32(-np.inf)
    s_T[end:] = np.float32(-np.inf)
    new = largest(s_T, half_T)
    if new > top:
        shrink = exponential(top - new)
        top = new
        for t in range(TILE):
            sums_T[t] = sums_T[t] * shrink
        for d in range(o_D.shape[0]):
            o_D[d] = o_D[d] * shrink
    for t in range(TILE):
        s_T[t] = exponential(s_T[t] - top)
    s_T[:begin] = np.float32(0)
    s_T[end:] = np.float32(0)
    for t in range(TILE):
        sums_T[t] = sums_T[t] + s_T[t]
    return top


@exact
def finish(sums_T: Any, o_D: Any, result_D: Any) -> None:
    """Add up the sums by halves and normalise."""
    width = TILE
    while width > 1:
        width //= 2
        for t in range(width):
            sums_T[t] = sums_T[t] + sums_T[t + width]
    for d in range(result_D.shape[0]):
        result_D[d] = o_D[d] / sums_T[0]


@exact
def attend_unit(
    q_NHD: Any, pools: Any, layout: Any, table_M: Any, unit: Any, group: int, options: Any, window: int, sinks_H: Any,
    o_NHD: Any,
) -> None:  # fmt: skip
    """The rows of one unit: (request, first token, tokens, position of the first, key/value head, its first slot)."""
    k, v, k_scales, v_scales = pools
    _, token, count, position, head, first_slot = unit
    M, D = count * group, q_NHD.shape[2]
    whole = (D + LANES - 1) // LANES * LANES
    keys_DT, values_TD = np.empty((D, TILE), np.float32), np.zeros((TILE, whole), np.float32)
    at_T3 = np.empty((TILE, 3), np.int64)
    s_T, half_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    o_MD, sums_MT = np.zeros((M, whole), np.float32), np.zeros((M, TILE), np.float32)
    top_M = np.full(M, -np.inf, np.float32)
    if sinks_H.shape[0] > 0:
        for row in range(M):
            top_M[row] = sinks_H[head * group + row % group]
            sums_MT[row, 0] = np.float32(1)
    first = max(0, position - window) if window >= 0 else 0
    last = position + count
    for start in range(first // TILE * TILE, last, TILE):
        at = at_T3[: min(TILE, last - start)]
        find_keys(table_M, first_slot + start, layout, at)
        load_keys(k, k_scales, head, layout[4], at, keys_DT)
        load_values(v, v_scales, head, layout[7], at, D, values_TD)
        for row in range(M):
            place = position + row // group
            begin = max(0, place - window - start) if window >= 0 else 0
            end = min(TILE, place + 1 - start)
            if begin < end:
                s_T[:] = np.float32(0)
                add_rows(q_NHD[token + row // group, head * group + row % group], 0, D, keys_DT, s_T)
                top_M[row] = weigh(s_T, begin, end, options, top_M[row], o_MD[row], sums_MT[row], half_T)
                add_rows(s_T, begin, end, values_TD, o_MD[row])
    for row in range(M):
        finish(sums_MT[row], o_MD[row], o_NHD[token + row // group, head * group + row % group])


@parallel
def attend(
    q_NHD: Any, pools: Any, layout: Any, table_RM: Any, units_U6: Any, options: Any, window: int, sinks_H: Any,
    o_NHD: Any,
) -> None:  # fmt: skip
    """Every unit. q, o and sinks in fp32; the rest as of `attention_loops.attend`; `window` < 0: none."""
    group = q_NHD.shape[1] // layout[1]
    for u in prange(units_U6.shape[0]):
        unit = units_U6[u]
        attend_unit(q_NHD, pools, layout, table_RM[unit[0]], unit, group, options, window, sinks_H, o_NHD)
