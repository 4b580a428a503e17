"""dK and dV: one program for each tile of keys of one key/value head, over all queries that see it.

Query heads that share the key/value head are visited one after the other, so that their sum has a fixed order.

Tiles are keys by queries, so that P^T and dS^T are the left operands of dV and dK as they lie. Registers are short:
with 128 keys of 128 numbers the two sums alone take half of them. So what belongs to queries (log-sum-exp, delta) is
put into the products' accumulators at the start instead of subtracted at the end, and P is kept in the inputs'
precision between its two uses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.attention.tile import (
    keep_factors,
    load_tile,
    query_bounds,
    query_places,
    store_tile,
    tile_scores,
)
from trine.kernels.language import dot, narrow


@triton.jit
def _visit(
    dk_ND, dv_ND, k_ND, v_ND, q_ptr, do_ptr, lse_ptr, delta_ptr, low_ptr, high_ptr, position_ptr, begin, end, keys_N,
    first_N, last_N, slope, bias_ptr, q_stride, do_stride, scale, softcap, num_queries, num_keys, seed, plane, drop,
    MASKED: tl.constexpr, ORDERED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, LOWER: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV of a tile of keys what the queries in [begin, end) give."""
    FOLDED: tl.constexpr = not (SOFTCAP or ALIBI or BIAS)
    for start in range(begin, end, BLOCK_M):
        steps_M = tl.arange(0, BLOCK_M)
        queries_M = start + steps_M
        q_MD = load_tile(q_ptr, start, q_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
        do_MD = load_tile(do_ptr, start, do_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
        # Rows past the end have a log-sum-exp of +inf, so that their weights are 0.
        lse_M = tl.load(lse_ptr + start + steps_M)
        delta_M = tl.load(delta_ptr + start + steps_M)
        places_M = queries_M
        if ALIBI:
            places_M = query_places(position_ptr, queries_M, num_queries)
        sums_NM = tl.zeros([k_ND.shape[0], BLOCK_M], dtype=tl.float32)
        if FOLDED:
            sums_NM -= lse_M[None, :]
        product_NM = dot(k_ND, tl.trans(q_MD), sums_NM)
        scores_NM, unit, slack = tile_scores(
            product_NM, queries_M[None, :], places_M[None, :], keys_N[:, None], 0, 0, slope, bias_ptr,
            scale, softcap, num_queries, num_keys, False, LOWER, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        p_NM = tl.exp2(scores_NM * unit) if FOLDED else tl.exp2(scores_NM * unit - lse_M[None, :])
        if MASKED and ORDERED:
            visible = queries_M[None, :] >= first_N[:, None]
            if LOWER:
                visible = visible & (queries_M[None, :] < last_N[:, None])
            p_NM = tl.where(visible, p_NM, 0.0)
        elif MASKED:
            low_M, high_M = query_bounds(low_ptr, high_ptr, queries_M, num_queries, num_keys, CAUSAL)
            p_NM = tl.where((keys_N[:, None] >= low_M[None, :]) & (keys_N[:, None] < high_M[None, :]), p_NM, 0.0)
        p_NM = narrow(p_NM, do_MD)
        sums_NM = tl.zeros([k_ND.shape[0], BLOCK_M], dtype=tl.float32)
        if DROPOUT:
            keep_NM = keep_factors(seed, plane, queries_M[None, :], keys_N[:, None], drop)
            dp_NM = dot(v_ND, tl.trans(do_MD), sums_NM) * keep_NM - delta_M[None, :]
            ds_NM = narrow(p_NM.to(tl.float32) * dp_NM * slack, q_MD)
            p_NM = narrow(p_NM.to(tl.float32) * keep_NM, do_MD)
        else:
            dp_NM = dot(v_ND, tl.trans(do_MD), sums_NM - delta_M[None, :])
            ds_NM = narrow(p_NM.to(tl.float32) * dp_NM * slack, q_MD)
        dv_ND = dot(p_NM, do_MD, dv_ND)
        dk_ND = dot(ds_NM, q_MD, dk_ND)
    return dk_ND, dv_ND


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    low_ptr, high_ptr, first_ptr, last_ptr, position_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    dk_batch_stride, dk_head_stride, dk_row_stride, low_stride, first_stride, position_stride, bias_stride,
    num_heads, group_size, num_queries, padded_queries, num_keys, scale, softcap, drop,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, LOWER: tl.constexpr, ORDERED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; under a causal mask the tiles that most queries see start first."""
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * BLOCK_N
    keys_N = key + tl.arange(0, BLOCK_N)
    k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride
    k_ND = load_tile(k_base, key, k_row_stride, num_keys, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    v_ND = load_tile(v_base, key, v_row_stride, num_keys, True, BLOCK_N, HEAD_DIM, BLOCK_D)

    # The queries that see some key of the tile, and those that see all of them. Keys past the end are taken for the
    # last one: what comes of them is not stored.
    inside_N = tl.minimum(keys_N, num_keys - 1)
    low_base, high_base = low_ptr, high_ptr
    if low_ptr is None:
        last_N = inside_N * 0 + num_queries
        first_N = inside_N if CAUSAL else inside_N * 0
    else:
        first_N = tl.load(first_ptr + batch * first_stride + inside_N)
        last_N = tl.load(last_ptr + batch * first_stride + inside_N)
        low_base, high_base = low_ptr + batch * low_stride, high_ptr + batch * low_stride
    begin = (tl.min(first_N, axis=0) // BLOCK_M) * BLOCK_M
    end = tl.max(last_N, axis=0)
    # Nothing is whole where queries come in no order.
    whole_begin = end
    whole_end = end
    if ORDERED:
        whole_begin = tl.cdiv(tl.max(first_N, axis=0), BLOCK_M) * BLOCK_M
        if LOWER:
            whole_end = (tl.min(last_N, axis=0) // BLOCK_M) * BLOCK_M
        whole_end = tl.maximum(whole_end, whole_begin)

    position_base = position_ptr
    if position_ptr is not None:
        position_base = position_ptr + batch * position_stride
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for member in range(group_size):
        head = kv_head * group_size + member
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32)
        bias_base = bias_ptr
        if BIAS:
            bias_base = bias_ptr + head * bias_stride
        plane = (batch * num_heads + head).to(tl.int32)
        rows = (batch * num_heads + head) * padded_queries
        q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
        do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
        dk_ND, dv_ND = _visit(
            dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse_ptr + rows, delta_ptr + rows, low_base, high_base,
            position_base, begin, tl.minimum(whole_begin, end), keys_N, first_N, last_N, slope, bias_base,
            q_row_stride, do_row_stride, scale, softcap, num_queries, num_keys, seed, plane, drop, True, ORDERED,
            CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M, LOWER, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        if ORDERED:
            dk_ND, dv_ND = _visit(
                dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse_ptr + rows, delta_ptr + rows, low_base, high_base,
                position_base, whole_begin, whole_end, keys_N, first_N, last_N, slope, bias_base, q_row_stride,
                do_row_stride, scale, softcap, num_queries, num_keys, seed, plane, drop, False, ORDERED, CAUSAL,
                HEAD_DIM, BLOCK_D, BLOCK_M, LOWER, SOFTCAP, ALIBI, BIAS, DROPOUT,
            )  # fmt: skip
        if ORDERED and LOWER:
            dk_ND, dv_ND = _visit(
                dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse_ptr + rows, delta_ptr + rows, low_base, high_base,
                position_base, whole_end, end, keys_N, first_N, last_N, slope, bias_base, q_row_stride,
                do_row_stride, scale, softcap, num_queries, num_keys, seed, plane, drop, True, ORDERED, CAUSAL,
                HEAD_DIM, BLOCK_D, BLOCK_M, LOWER, SOFTCAP, ALIBI, BIAS, DROPOUT,
            )  # fmt: skip
    places = batch * dk_batch_stride + kv_head * dk_head_stride
    store_tile(dk_ptr + places, dk_ND * scale, key, dk_row_stride, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr + places, dv_ND, key, dk_row_stride, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
