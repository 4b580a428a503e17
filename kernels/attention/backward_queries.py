"""dQ: one program for each tile of queries of one head, over all keys it sees; one loop, as in `backward_keys.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.attention.tile import (
    between,
    keep_factors,
    load_tile,
    query_bounds,
    query_places,
    store_tile,
    tile_scores,
)
from trine.kernels.language import dot, narrow


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    low_ptr, high_ptr, position_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    dq_batch_stride, dq_head_stride, dq_row_stride, low_stride, position_stride, bias_stride,
    num_heads, group_size, num_queries, padded_queries, num_keys, scale, softcap, drop,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; tiles with more keys start first."""
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group_size
    plane = batch * num_heads + head
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    queries_M = first + tl.arange(0, BLOCK_M)
    q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
    do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
    q_MD = load_tile(q_base, first, q_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    do_MD = load_tile(do_base, first, do_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse_M = tl.load(lse_ptr + plane * padded_queries + queries_M)
    delta_M = tl.load(delta_ptr + plane * padded_queries + queries_M)
    k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride

    low_base, high_base, position_base = low_ptr, high_ptr, position_ptr
    if low_ptr is not None:
        low_base, high_base = low_ptr + batch * low_stride, high_ptr + batch * low_stride
    if position_ptr is not None:
        position_base = position_ptr + batch * position_stride
    low_M, high_M = query_bounds(low_base, high_base, queries_M, num_queries, num_keys, CAUSAL)
    slope = 0.0
    places_M = queries_M
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
        places_M = query_places(position_base, queries_M, num_queries)
    bias_base = bias_ptr
    if BIAS:
        bias_base = bias_ptr + head * bias_stride
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range((tl.min(low_M, axis=0) // BLOCK_N) * BLOCK_N, tl.max(high_M, axis=0), BLOCK_N):
        keys_N = start + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_base, start, k_row_stride, num_keys, True, BLOCK_N, HEAD_DIM, BLOCK_D)
        v_ND = load_tile(v_base, start, v_row_stride, num_keys, True, BLOCK_N, HEAD_DIM, BLOCK_D)
        zeros_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        product_MN = dot(q_MD, tl.trans(k_ND), zeros_MN)
        dp_MN = dot(do_MD, tl.trans(v_ND), zeros_MN)
        scores_MN, unit, slack = tile_scores(
            product_MN, queries_M[:, None], places_M[:, None], keys_N[None, :], slope, bias_base, scale, softcap,
            num_queries, num_keys, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        p_MN = tl.exp2(scores_MN * unit - lse_M[:, None])
        p_MN = tl.where(between(keys_N[None, :], low_M[:, None], high_M[:, None]), p_MN, 0.0)
        if DROPOUT:
            dp_MN *= keep_factors(seed, plane.to(tl.int32), queries_M[:, None], keys_N[None, :], drop)
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * slack
        dq_MD = dot(narrow(ds_MN, k_ND), k_ND, dq_MD)
    dq_base = dq_ptr + batch * dq_batch_stride + head * dq_head_stride
    store_tile(dq_base, dq_MD * scale, first, dq_row_stride, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D)
