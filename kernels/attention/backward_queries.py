"""dQ: one program for each tile of queries of one head, over all keys it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.attention.tile import (
    keep_factors,
    load_tile,
    lse_unit,
    query_bounds,
    query_places,
    store_tile,
    tile_scores,
)
from trine.kernels.language import dot, narrow


@triton.jit
def _visit(
    dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, begin, end, queries_M, places_M, low_M, high_M, slope, bias_ptr,
    k_stride, v_stride, scale, softcap, num_queries, num_keys, seed, plane, drop,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWER: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add to dQ of a tile of queries what the keys in [begin, end) give."""
    for start in range(begin, end, BLOCK_N):
        keys_N = start + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_ptr, start, k_stride, num_keys, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        v_ND = load_tile(v_ptr, start, v_stride, num_keys, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        zeros_MN = tl.zeros([q_MD.shape[0], BLOCK_N], dtype=tl.float32)
        product_MN = dot(q_MD, tl.trans(k_ND), zeros_MN)
        dp_MN = dot(do_MD, tl.trans(v_ND), zeros_MN)
        scores_MN, unit, slack = tile_scores(
            product_MN, queries_M[:, None], places_M[:, None], keys_N[None, :], low_M[:, None], high_M[:, None], slope,
            bias_ptr, scale, softcap, num_queries, num_keys, MASKED, LOWER, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        p_MN = tl.exp2(scores_MN * unit - lse_M[:, None])
        if DROPOUT:
            dp_MN *= keep_factors(seed, plane, queries_M[:, None], keys_N[None, :], drop)
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * slack
        dq_MD = dot(narrow(ds_MN, k_ND), k_ND, dq_MD)
    return dq_MD


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    low_ptr, high_ptr, position_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    dq_batch_stride, dq_head_stride, dq_row_stride,
    low_stride, position_stride, bias_stride, num_heads, group_size, num_queries, padded_queries, num_keys, scale,
    softcap, drop,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, LOWER: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; tiles with more keys start first."""
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group_size
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    queries_M = first + tl.arange(0, BLOCK_M)
    q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
    do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
    q_MD = load_tile(q_base, first, q_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    do_MD = load_tile(do_base, first, do_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = (batch * num_heads + head) * padded_queries
    lse_M = tl.load(lse_ptr + rows + queries_M) * lse_unit(scale, SOFTCAP or ALIBI or BIAS)
    delta_M = tl.load(delta_ptr + rows + queries_M)

    low_base, high_base = low_ptr, high_ptr
    if low_ptr is not None:
        low_base, high_base = low_ptr + batch * low_stride, high_ptr + batch * low_stride
    low_M, high_M = query_bounds(low_base, high_base, queries_M, num_queries, num_keys, CAUSAL)
    some_high, all_high = tl.max(high_M, axis=0), tl.min(high_M, axis=0)
    begin = 0
    whole_begin = 0
    if LOWER:
        begin = (tl.min(low_M, axis=0) // BLOCK_N) * BLOCK_N
        whole_begin = tl.cdiv(tl.max(low_M, axis=0), BLOCK_N) * BLOCK_N
    whole_end = tl.maximum((all_high // BLOCK_N) * BLOCK_N, whole_begin)

    slope = 0.0
    places_M = queries_M
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
        position_base = position_ptr
        if position_ptr is not None:
            position_base = position_ptr + batch * position_stride
        places_M = query_places(position_base, queries_M, num_queries)
    bias_base = bias_ptr
    if BIAS:
        bias_base = bias_ptr + head * bias_stride
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    plane = (batch * num_heads + head).to(tl.int32)
    k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if LOWER:
        dq_MD = _visit(
            dq_MD, q_MD, do_MD, lse_M, delta_M, k_base, v_base, begin, tl.minimum(whole_begin, some_high), queries_M,
            places_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries,
            num_keys, seed, plane, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, LOWER, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
    dq_MD = _visit(
        dq_MD, q_MD, do_MD, lse_M, delta_M, k_base, v_base, whole_begin, whole_end, queries_M, places_M,
        low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries, num_keys, seed,
        plane, drop, False, HEAD_DIM, BLOCK_D, BLOCK_N, LOWER, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip
    dq_MD = _visit(
        dq_MD, q_MD, do_MD, lse_M, delta_M, k_base, v_base, whole_end, some_high, queries_M, places_M,
        low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries, num_keys, seed,
        plane, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, LOWER, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip
    dq_base = dq_ptr + batch * dq_batch_stride + head * dq_head_stride
    store_tile(dq_base, dq_MD * scale, first, dq_row_stride, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D)
