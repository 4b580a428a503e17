"""dK and dV: one program for each tile of keys of one key/value head, over all queries that see it.

Query heads that share the key/value head are visited one after the other in one loop, so that their sum has a fixed
order and loads run ahead from one head into the next.

Tiles are keys by queries, so that P^T and dS^T are the left operands of dV and dK as they lie. Registers are short:
with 128 keys of 128 numbers the two sums alone take half of them. So delta is put into the accumulator of dP at the
start instead of subtracted at the end, P is kept in the inputs' precision between its two uses, and one loop masks
every tile, at the price of a comparison, instead of three loops that would keep their addresses apart.
"""

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
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    low_ptr, high_ptr, first_ptr, last_ptr, position_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    dk_batch_stride, dk_head_stride, dk_row_stride, low_stride, first_stride, position_stride, bias_stride,
    num_heads, group_size, num_queries, padded_queries, num_keys, scale, softcap, drop,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ORDERED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    q_base, do_base = q_ptr + batch * q_batch_stride, do_ptr + batch * do_batch_stride

    # Keys past the end are taken for the last one: what comes of them is not stored.
    inside_N = tl.minimum(keys_N, num_keys - 1)
    low_base, high_base, position_base = low_ptr, high_ptr, position_ptr
    if low_ptr is None:
        first_N = inside_N if CAUSAL else inside_N * 0
        last_N = inside_N * 0 + num_queries
    else:
        first_N = tl.load(first_ptr + batch * first_stride + inside_N)
        last_N = tl.load(last_ptr + batch * first_stride + inside_N)
        low_base, high_base = low_ptr + batch * low_stride, high_ptr + batch * low_stride
    if position_ptr is not None:
        position_base = position_ptr + batch * position_stride
    begin = (tl.min(first_N, axis=0) // BLOCK_M) * BLOCK_M
    num_tiles = tl.cdiv(tl.max(last_N, axis=0) - begin, BLOCK_M)

    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    steps_M = tl.arange(0, BLOCK_M)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for step in range(num_tiles * group_size):
        head = kv_head * group_size + step // num_tiles
        start = begin + (step % num_tiles) * BLOCK_M
        plane = batch * num_heads + head
        queries_M = start + steps_M
        q_MD = load_tile(
            q_base + head * q_head_stride, start, q_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D
        )
        do_MD = load_tile(
            do_base + head * do_head_stride, start, do_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D
        )
        # Rows past the end have a log-sum-exp of +inf, so that their weights are 0.
        rows = plane * padded_queries + start
        lse_M = tl.load(lse_ptr + rows + steps_M)
        delta_M = tl.load(delta_ptr + rows + steps_M)
        slope = 0.0
        places_M = queries_M
        if ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32)
            places_M = query_places(position_base, queries_M, num_queries)
        bias_base = bias_ptr
        if BIAS:
            bias_base = bias_ptr + head * bias_stride

        zeros_NM = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        product_NM = dot(k_ND, tl.trans(q_MD), zeros_NM)
        scores_NM, unit, slack = tile_scores(
            product_NM, queries_M[None, :], places_M[None, :], keys_N[:, None], slope, bias_base, scale, softcap,
            num_queries, num_keys, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        p_NM = tl.exp2(scores_NM * unit - lse_M[None, :])
        if ORDERED:
            visible = between(queries_M[None, :], first_N[:, None], last_N[:, None])
        else:
            low_M, high_M = query_bounds(low_base, high_base, queries_M, num_queries, num_keys, CAUSAL)
            visible = between(keys_N[:, None], low_M[None, :], high_M[None, :])
        p_NM = narrow(tl.where(visible, p_NM, 0.0), do_MD)
        if DROPOUT:
            keep_NM = keep_factors(seed, plane.to(tl.int32), queries_M[None, :], keys_N[:, None], drop)
            dp_NM = dot(v_ND, tl.trans(do_MD), zeros_NM) * keep_NM - delta_M[None, :]
            ds_NM = narrow(p_NM.to(tl.float32) * dp_NM * slack, q_MD)
            p_NM = narrow(p_NM.to(tl.float32) * keep_NM, do_MD)
        else:
            dp_NM = dot(v_ND, tl.trans(do_MD), zeros_NM - delta_M[None, :])
            ds_NM = narrow(p_NM.to(tl.float32) * dp_NM * slack, q_MD)
        dv_ND = dot(p_NM, do_MD, dv_ND)
        dk_ND = dot(ds_NM, q_MD, dk_ND)
    places = batch * dk_batch_stride + kv_head * dk_head_stride
    store_tile(dk_ptr + places, dk_ND * scale, key, dk_row_stride, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr + places, dv_ND, key, dk_row_stride, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
