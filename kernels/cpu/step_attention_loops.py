"""Attention in a step of decoding: for each request its newest key and value into the cache, then its queries over it.

Requests, splits of keys and ranges of heads are pieces of work (`step_loops.py`). What is kept in a cache decides which
of three functions is compiled; they are called by address. Imports Numba (see `compiled.py`). Shapes as in `layer.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from trine.kernels.cpu.attention_loops import SPLIT, attend_split, merge, visible
from trine.kernels.cpu.compiled import callback, serial
from trine.kernels.cpu.memory_loops import bytes_at, call_with, claim, doubles, finish, floats, longs, shorts, words
from trine.kernels.cpu.product_loops import BFLOAT16, FLOAT32, INT8
from trine.kernels.cpu.rows_loops import layer_norm, rms_factor, turn, write_head
from trine.kernels.cpu.step_layout_loops import (
    ATTEND_HEADS,
    ATTENDED,
    BLOCK_SIZE,
    CLIP,
    COS,
    DISTANCES,
    DONE,
    EPS,
    HEAD_DIM,
    HEADER,
    HEADS,
    INTERLEAVED,
    K_BLOCK,
    K_HEAD,
    K_NORM,
    K_NORM_BIAS,
    K_NUMBERS,
    K_SCALE,
    K_SLOT,
    KV_HEADS,
    LAYER_LENGTH,
    LENGTHS,
    NUM_SCALES,
    NUM_SPLITS,
    OFFSET,
    OPTIONS,
    OTHER_COS,
    OTHER_PAIRS,
    OTHER_SIN,
    PAIRS,
    PARTS,
    Q_NORM,
    Q_NORM_BIAS,
    QK_NORM,
    QKV,
    RELATIVE,
    ROTATION,
    ROWS,
    SCALE,
    SIN,
    SINKS,
    SLOTS,
    SOFTCAP,
    TABLE,
    TABLE_WIDTH,
    V_BLOCK,
    V_HEAD,
    V_NUMBERS,
    V_SCALE,
    V_SLOT,
    WINDOW,
    K,
    V,
)

# What norms of q and k are taken over, as in `layer.py`.
EACH_HEAD, ALL_HEADS, LAYER_NORM_HEADS = range(3)


@serial
def clip(options: Any, x_D: Any) -> None:
    """A head within the layer's bounds."""
    limit = np.float32(options[CLIP])
    for d in range(x_D.shape[0]):
        x_D[d] = min(max(x_D[d], -limit), limit)


@serial
def normed_head(layer: Any, options: Any, angles: Any, norm: int, bias: int, heads: Any, x: int, y_D: Any) -> None:
    """Head x of those of q or k with its norm, or its part of the norm of all, and its rotation."""
    D = y_D.shape[0]
    x_D = heads[x * D : (x + 1) * D]
    if norm == 0:
        for d in range(D):
            y_D[d] = x_D[d]
    elif layer[QK_NORM] == LAYER_NORM_HEADS:
        bias_D = floats(bias + 4 * x * D, D if bias != 0 else 0)
        layer_norm(x_D, floats(norm + 4 * x * D, D), bias_D, np.float32(options[EPS]), y_D)
    else:
        full = layer[QK_NORM] == ALL_HEADS
        factor = rms_factor(heads if full else x_D, np.float32(options[EPS]))
        weight_D, offset = floats(norm + (4 * x * D if full else 0), D), np.float32(options[OFFSET])
        for d in range(D):
            y_D[d] = x_D[d] * factor * (weight_D[d] + offset)
    if options[CLIP] > 0:
        clip(options, y_D)
    turn(y_D, angles[0], angles[1], layer[INTERLEAVED] != 0)


@serial
def angles_of(header: Any, layer: Any, m: int) -> Any:
    """cos and sin of a request's new token, as the layer turns it; of no pairs where it does not."""
    other = layer[ROTATION] == 1
    cos, sin = (header[OTHER_COS], header[OTHER_SIN]) if other else (header[COS], header[SIN])
    pairs = header[OTHER_PAIRS] if other else header[PAIRS]
    R = pairs if layer[ROTATION] >= 0 else 0
    return floats(cos + 4 * m * pairs, R), floats(sin + 4 * m * pairs, R)


@serial
def attend_pools(
    header: Any, layer: Any, options: Any, pools: Any, m: int, split: int, first_head: int, last_head: int
) -> None:
    """One split of the keys of a request, for a range of key/value heads and their query heads.

    Who has the newest key also writes it: no other piece of work reads that slot in this phase.
    """
    H, num_kv_heads, D = layer[HEADS], layer[KV_HEADS], layer[HEAD_DIM]
    group, angles = H // num_kv_heads, angles_of(header, layer, m)
    qkv = floats(header[QKV] + 4 * m * (H + 2 * num_kv_heads) * D, (H + 2 * num_kv_heads) * D)
    length = words(header[LENGTHS], header[ROWS])[m]
    first_key, first_split = visible(length, layer[WINDOW])
    begin = max(first_key, (first_split + split) * SPLIT)
    end = min(length, (first_split + split + 1) * SPLIT)
    slot = longs(header[SLOTS], header[ROWS])[m]
    if end == length and begin < end and slot >= 0:
        k, v, k_scales, v_scales = pools
        k_D = np.empty(D, np.float32)
        for x in range(first_head, last_head):
            k_KD = qkv[H * D : (H + num_kv_heads) * D]
            normed_head(layer, options, angles, layer[K_NORM], layer[K_NORM_BIAS], k_KD, x, k_D)
            v_D = qkv[(H + num_kv_heads + x) * D : (H + num_kv_heads + x + 1) * D]
            if options[CLIP] > 0:
                clip(options, v_D)
            scale_place = slot * num_kv_heads + x
            write_head(k_D, k, slot * layer[K_SLOT] + x * layer[K_HEAD], k_scales, scale_place)
            write_head(v_D, v, slot * layer[V_SLOT] + x * layer[V_HEAD], v_scales, scale_place)
    first, G = first_head * group, (last_head - first_head) * group
    q_GD = np.empty((G, D), np.float32)
    for g in range(G):
        normed_head(layer, options, angles, layer[Q_NORM], layer[Q_NORM_BIAS], qkv[: H * D], first + g, q_GD[g])
    layout = (
        layer[BLOCK_SIZE], num_kv_heads, layer[K_BLOCK], layer[K_SLOT], layer[K_HEAD], layer[V_BLOCK], layer[V_SLOT],
        layer[V_HEAD],
    )  # fmt: skip
    table = words(header[TABLE] + 4 * m * header[TABLE_WIDTH], header[TABLE_WIDTH])
    factors = (np.float32(options[SCALE]), np.float32(options[SOFTCAP]))
    W = layer[DISTANCES]
    relative = (floats(layer[RELATIVE], H * W).reshape(H, W), length - 1)
    if header[NUM_SPLITS] > 1:
        part = part_of(header, H, D, m, split, first, G)
        attend_split(q_GD, (first, group), pools, layout, table, begin, end, factors, relative, part)
        return
    o_1GD, largest_1G, total_1G = (
        np.empty((1, G, D), np.float32),
        np.empty((1, G), np.float32),
        np.empty((1, G), np.float32),
    )
    attend_split(
        q_GD,
        (first, group),
        pools,
        layout,
        table,
        begin,
        end,
        factors,
        relative,
        (o_1GD[0], largest_1G[0], total_1G[0]),
    )
    sinks_H = floats(layer[SINKS], H if layer[SINKS] != 0 else 0)
    for g in range(G):
        o_D = floats(header[ATTENDED] + 4 * (m * H + first + g) * D, D)
        merge(o_1GD[:, g], largest_1G[:, g], total_1G[:, g], sinks_H[first + g : first + g + 1], o_D)


@serial
def part_of(header: Any, num_heads: int, head_dim: int, m: int, split: int, first: int, count: int) -> Any:
    """The sums of some heads over one split, in memory that all threads share: (o_GD, largest_G, total_G)."""
    at = (m * header[NUM_SPLITS] + split) * num_heads + first
    rows = header[ROWS] * header[NUM_SPLITS] * num_heads
    o_GD = floats(header[PARTS] + 4 * at * head_dim, count * head_dim).reshape(count, head_dim)
    largest = floats(header[PARTS] + 4 * (rows * head_dim + at), count)
    return o_GD, largest, floats(header[PARTS] + 4 * (rows * (head_dim + 1) + at), count)


@serial
def scales_of(layer: Any) -> Any:
    """The scales of a layer's pools; none, except of int8."""
    return floats(layer[K_SCALE], layer[NUM_SCALES]), floats(layer[V_SCALE], layer[NUM_SCALES])


def attend_float32(
    header_place: int, layer_place: int, options_place: int, m: int, split: int, first_head: int, last_head: int
) -> None:
    """`attend_pools` for a cache of fp32."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    pools = (floats(layer[K], layer[K_NUMBERS]), floats(layer[V], layer[V_NUMBERS]), *scales_of(layer))
    attend_pools(header, layer, doubles(options_place, len(OPTIONS)), pools, m, split, first_head, last_head)


def attend_bfloat16(
    header_place: int, layer_place: int, options_place: int, m: int, split: int, first_head: int, last_head: int
) -> None:
    """`attend_pools` for a cache of bf16."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    pools = (shorts(layer[K], layer[K_NUMBERS]), shorts(layer[V], layer[V_NUMBERS]), *scales_of(layer))
    attend_pools(header, layer, doubles(options_place, len(OPTIONS)), pools, m, split, first_head, last_head)


def attend_int8(
    header_place: int, layer_place: int, options_place: int, m: int, split: int, first_head: int, last_head: int
) -> None:
    """`attend_pools` for a cache of int8."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    pools = (bytes_at(layer[K], layer[K_NUMBERS]), bytes_at(layer[V], layer[V_NUMBERS]), *scales_of(layer))
    attend_pools(header, layer, doubles(options_place, len(OPTIONS)), pools, m, split, first_head, last_head)


@lru_cache(maxsize=3)
def attend_address(kind: int) -> int:
    """The address of the function for a kind of cache; each is compiled when it is first asked for."""
    function = {FLOAT32: attend_float32, BFLOAT16: attend_bfloat16, INT8: attend_int8}[kind]
    return int(callback("void(int64, int64, int64, int64, int64, int64, int64)")(function).address)


@serial
def attend_step(header_place: int, layer_place: int, options_place: int, counter: int, team: int) -> Any:
    """Attention of all requests of the step, by pieces."""
    header, layer = longs(header_place, len(HEADER)), longs(layer_place, LAYER_LENGTH)
    M, num_splits, num_kv_heads = header[ROWS], header[NUM_SPLITS], layer[KV_HEADS]
    num_ranges = min(num_kv_heads, max(1, -(-2 * team // (M * num_splits))))
    size = -(-num_kv_heads // num_ranges)
    pieces, piece = M * num_splits * num_ranges, claim(counter)
    while piece < pieces:
        m, split, first = piece // num_ranges // num_splits, piece // num_ranges % num_splits, piece % num_ranges * size
        last = min(num_kv_heads, first + size)
        if first < last:
            call_with(layer[ATTEND_HEADS], (header_place, layer_place, options_place, m, split, first, last))
        finish(counter + DONE)
        piece = claim(counter)
    return pieces


@serial
def merge_step(header: Any, layer: Any, counter: int) -> Any:
    """Add up the splits of all heads."""
    M, H, D, num_splits = header[ROWS], layer[HEADS], layer[HEAD_DIM], header[NUM_SPLITS]
    rows = M * num_splits * H
    o_MUHD = floats(header[PARTS], rows * D).reshape(M, num_splits, H, D)
    largest_MUH = floats(header[PARTS] + 4 * rows * D, rows).reshape(M, num_splits, H)
    total_MUH = floats(header[PARTS] + 4 * rows * (D + 1), rows).reshape(M, num_splits, H)
    sinks_H = floats(layer[SINKS], H if layer[SINKS] != 0 else 0)
    m = claim(counter)
    while m < M:
        for h in range(H):
            o_D = floats(header[ATTENDED] + 4 * (m * H + h) * D, D)
            merge(o_MUHD[m, :, h], largest_MUH[m, :, h], total_MUH[m, :, h], sinks_H[h : h + 1], o_D)
        finish(counter + DONE)
        m = claim(counter)
    return M
