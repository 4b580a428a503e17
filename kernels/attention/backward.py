"""The backward pass of flash attention: dK and dV by tiles of keys, dQ by tiles of queries.

    P = exp(scores - lse)      dP = (dO V^T) * keep      dS = P * (dP - delta)      delta = rowsum(dO * O)
    dV = (P * keep)^T dO       dK = scale * dS^T Q       dQ = scale * dS K          dsink = -sum over rows of P_sink delta

Each gradient is summed by one program in a fixed order, at the price of computing the scores twice: nothing is added
atomically, so two runs give the same bits. Query heads that share a key/value head are visited one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.attention.options import Options, common_arguments, strides
from trine.kernels.attention.tile import LOG2E, keep_factors, tile_scores
from trine.kernels.language import dot, narrow
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def _prepare_kernel(
    o_ptr, do_ptr, lse_ptr, delta_ptr, lse2_ptr,
    o_batch_stride, o_head_stride, o_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    num_heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta_BHT = rowsum(dO * O), and the log-sum-exp in log2 units, +inf for rows that see no key: both fp32."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    queries_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels_D = tl.arange(0, BLOCK_D)
    row_inside = queries_M < num_queries
    inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
    places_M = queries_M.to(tl.int64)
    o_base = o_ptr + batch * o_batch_stride + head * o_head_stride
    do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
    o_MD = tl.load(o_base + places_M[:, None] * o_row_stride + channels_D[None, :], mask=inside, other=0.0)
    do_MD = tl.load(do_base + places_M[:, None] * do_row_stride + channels_D[None, :], mask=inside, other=0.0)
    delta_M = tl.sum(o_MD.to(tl.float32) * do_MD.to(tl.float32), axis=1)
    rows_M = (batch * num_heads + head) * num_queries + places_M
    lse_M = tl.load(lse_ptr + rows_M, mask=row_inside, other=0.0)
    tl.store(delta_ptr + rows_M, delta_M, mask=row_inside)
    # exp2(score - inf) is 0, where score - -inf would not be a number.
    tl.store(lse2_ptr + rows_M, tl.where(lse_M == float("-inf"), float("inf"), lse_M * LOG2E), mask=row_inside)


@triton.jit
def _tile_gradient(
    product, dp, lse, delta, queries, keys, low, high, slope, bias_ptr, scale, softcap, num_queries, num_keys, seed, rows,
    drop,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """(P * keep, dS without the scale) of one tile, fp32, from the products q k^T and dO V^T; shapes as in tile.py."""
    scores, slack = tile_scores(
        product, queries, keys, low, high, slope, bias_ptr, scale, softcap, num_queries, num_keys,
        MASKED, SOFTCAP, ALIBI, BIAS,
    )  # fmt: skip
    p = tl.exp2(scores - lse)
    kept = p
    if DROPOUT:
        keep = keep_factors(seed, rows, keys, drop, DROPOUT)
        kept = p * keep
        dp *= keep
    return kept, p * (dp - delta) * slack


@triton.jit
def _keys_visit(
    dk_ND, dv_ND, k_ND, v_ND, q_ptr, do_ptr, lse_ptr, delta_ptr, low_ptr, high_ptr, begin, end, keys_N, slope,
    bias_ptr, q_stride, do_stride, scale, softcap, num_queries, num_keys, seed, row_base, drop,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV of a tile of keys what the queries in [begin, end) give."""
    channels_D = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_M):
        queries_M = start + tl.arange(0, BLOCK_M)
        row_inside = queries_M < num_queries
        inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
        places_M = queries_M.to(tl.int64)
        q_MD = tl.load(q_ptr + places_M[:, None] * q_stride + channels_D[None, :], mask=inside, other=0.0)
        do_MD = tl.load(do_ptr + places_M[:, None] * do_stride + channels_D[None, :], mask=inside, other=0.0)
        # Rows past the end get exp2(-inf) = 0.
        lse_M = tl.load(lse_ptr + places_M, mask=row_inside, other=float("inf"))
        delta_M = tl.load(delta_ptr + places_M, mask=row_inside, other=0.0)
        low_M = tl.load(low_ptr + places_M, mask=row_inside, other=0)
        high_M = tl.load(high_ptr + places_M, mask=row_inside, other=0)
        # Keys by queries, so that both products below take this tile as it lies.
        zeros_NM = tl.zeros([k_ND.shape[0], BLOCK_M], dtype=tl.float32)
        product_NM = dot(k_ND, tl.trans(q_MD), zeros_NM)
        dp_NM = dot(v_ND, tl.trans(do_MD), zeros_NM)
        p_NM, ds_NM = _tile_gradient(
            product_NM, dp_NM, lse_M[None, :], delta_M[None, :], queries_M[None, :], keys_N[:, None], low_M[None, :],
            high_M[None, :], slope, bias_ptr, scale, softcap, num_queries, num_keys, seed,
            (row_base + places_M * num_keys)[None, :], drop, MASKED, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        dv_ND = dot(narrow(p_NM, do_MD), do_MD, dv_ND)
        dk_ND = dot(narrow(ds_NM, q_MD), q_MD, dk_ND)
    return dk_ND, dv_ND


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    low_ptr, high_ptr, first_ptr, last_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    dk_batch_stride, dk_head_stride, dk_row_stride,
    low_stride, first_stride, bias_stride, num_heads, group_size, num_queries, num_keys, scale, softcap, drop,
    SOFTCAP: tl.constexpr, LOWER: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key/value head, over the queries that see it."""
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    keys_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels_D = tl.arange(0, BLOCK_D)
    inside = (keys_N < num_keys)[:, None] & (channels_D[None, :] < HEAD_DIM)
    places_N = keys_N.to(tl.int64)
    k_base = k_ptr + batch * k_batch_stride + kv_head.to(tl.int64) * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head.to(tl.int64) * v_head_stride
    k_ND = tl.load(k_base + places_N[:, None] * k_row_stride + channels_D[None, :], mask=inside, other=0.0)
    v_ND = tl.load(v_base + places_N[:, None] * v_row_stride + channels_D[None, :], mask=inside, other=0.0)

    # The queries that see some key of the tile, and those that see all of them.
    seen_N = batch * first_stride + tl.minimum(keys_N, num_keys - 1)
    first_N, last_N = tl.load(first_ptr + seen_N), tl.load(last_ptr + seen_N)
    begin = (tl.min(first_N, axis=0) // BLOCK_M) * BLOCK_M
    end = tl.max(last_N, axis=0)
    whole_begin = tl.cdiv(tl.max(first_N, axis=0), BLOCK_M) * BLOCK_M
    whole_end = end
    if LOWER:
        whole_end = (tl.min(last_N, axis=0) // BLOCK_M) * BLOCK_M
    # The last tile of queries may reach past the end; its rows are masked by their log-sum-exp.
    whole_end = tl.maximum(whole_end, whole_begin)
    # A tile of keys that reaches past the end is masked everywhere.
    if (tl.program_id(0) + 1) * BLOCK_N > num_keys:
        whole_begin = end
        whole_end = end

    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for member in range(group_size):
        head = (kv_head * group_size + member).to(tl.int64)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32)
        bias_base = bias_ptr
        if BIAS:
            bias_base = bias_ptr + head * bias_stride
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
        rows = (batch * num_heads + head) * num_queries
        q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
        do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
        low_base, high_base = low_ptr + batch * low_stride, high_ptr + batch * low_stride
        dk_ND, dv_ND = _keys_visit(
            dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse2_ptr + rows, delta_ptr + rows, low_base, high_base,
            begin, tl.minimum(whole_begin, end), keys_N, slope, bias_base, q_row_stride, do_row_stride, scale, softcap,
            num_queries, num_keys, seed, rows * num_keys, drop,
            True, HEAD_DIM, BLOCK_D, BLOCK_M, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        dk_ND, dv_ND = _keys_visit(
            dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse2_ptr + rows, delta_ptr + rows, low_base, high_base,
            whole_begin, whole_end, keys_N, slope, bias_base, q_row_stride, do_row_stride, scale, softcap,
            num_queries, num_keys, seed, rows * num_keys, drop,
            False, HEAD_DIM, BLOCK_D, BLOCK_M, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        if LOWER:
            dk_ND, dv_ND = _keys_visit(
                dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse2_ptr + rows, delta_ptr + rows, low_base, high_base,
                whole_end, end, keys_N, slope, bias_base, q_row_stride, do_row_stride, scale, softcap,
                num_queries, num_keys, seed, rows * num_keys, drop,
                True, HEAD_DIM, BLOCK_D, BLOCK_M, SOFTCAP, ALIBI, BIAS, DROPOUT,
            )  # fmt: skip
    places = batch * dk_batch_stride + kv_head.to(tl.int64) * dk_head_stride
    places_ND = places + places_N[:, None] * dk_row_stride + channels_D[None, :]
    tl.store(dk_ptr + places_ND, (dk_ND * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + places_ND, dv_ND.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _queries_visit(
    dq_MD, q_MD, do_MD, lse_M, delta_M, k_ptr, v_ptr, begin, end, queries_M, low_M, high_M, slope, bias_ptr,
    k_stride, v_stride, scale, softcap, num_queries, num_keys, seed, rows_M, drop,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add to dQ of a tile of queries what the keys in [begin, end) give."""
    channels_D = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys_N = start + tl.arange(0, BLOCK_N)
        places_N = keys_N.to(tl.int64)
        inside = (keys_N < num_keys)[:, None] & (channels_D[None, :] < HEAD_DIM)
        k_ND = tl.load(k_ptr + places_N[:, None] * k_stride + channels_D[None, :], mask=inside, other=0.0)
        v_ND = tl.load(v_ptr + places_N[:, None] * v_stride + channels_D[None, :], mask=inside, other=0.0)
        zeros_MN = tl.zeros([q_MD.shape[0], BLOCK_N], dtype=tl.float32)
        product_MN = dot(q_MD, tl.trans(k_ND), zeros_MN)
        dp_MN = dot(do_MD, tl.trans(v_ND), zeros_MN)
        _, ds_MN = _tile_gradient(
            product_MN, dp_MN, lse_M[:, None], delta_M[:, None], queries_M[:, None], keys_N[None, :], low_M[:, None],
            high_M[:, None], slope, bias_ptr, scale, softcap, num_queries, num_keys, seed, rows_M[:, None], drop,
            MASKED, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        dq_MD = dot(narrow(ds_MN, k_ND), k_ND, dq_MD)
    return dq_MD


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr,
    low_ptr, high_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    dq_batch_stride, dq_head_stride, dq_row_stride,
    low_stride, bias_stride, num_heads, group_size, num_queries, num_keys, scale, softcap, drop,
    SOFTCAP: tl.constexpr, LOWER: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, over the keys it sees; tiles with more keys start first."""
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = (head // group_size).to(tl.int64)
    head = head.to(tl.int64)
    queries_M = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels_D = tl.arange(0, BLOCK_D)
    row_inside = queries_M < num_queries
    inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
    places_M = queries_M.to(tl.int64)
    q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
    do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
    q_MD = tl.load(q_base + places_M[:, None] * q_row_stride + channels_D[None, :], mask=inside, other=0.0)
    do_MD = tl.load(do_base + places_M[:, None] * do_row_stride + channels_D[None, :], mask=inside, other=0.0)
    rows = (batch * num_heads + head) * num_queries
    lse_M = tl.load(lse2_ptr + rows + places_M, mask=row_inside, other=float("inf"))
    delta_M = tl.load(delta_ptr + rows + places_M, mask=row_inside, other=0.0)

    bounds_M = batch * low_stride + tl.minimum(queries_M, num_queries - 1)
    low_M, high_M = tl.load(low_ptr + bounds_M), tl.load(high_ptr + bounds_M)
    some_high, all_high = tl.max(high_M, axis=0), tl.min(high_M, axis=0)
    begin = 0
    whole_begin = 0
    if LOWER:
        begin = (tl.min(low_M, axis=0) // BLOCK_N) * BLOCK_N
        whole_begin = tl.cdiv(tl.max(low_M, axis=0), BLOCK_N) * BLOCK_N
    whole_end = tl.maximum((all_high // BLOCK_N) * BLOCK_N, whole_begin)

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    bias_base = bias_ptr
    if BIAS:
        bias_base = bias_ptr + head * bias_stride
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    rows_M = (rows + places_M) * num_keys
    k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if LOWER:
        dq_MD = _queries_visit(
            dq_MD, q_MD, do_MD, lse_M, delta_M, k_base, v_base, begin, tl.minimum(whole_begin, some_high), queries_M,
            low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries, num_keys, seed,
            rows_M, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
    dq_MD = _queries_visit(
        dq_MD, q_MD, do_MD, lse_M, delta_M, k_base, v_base, whole_begin, whole_end, queries_M,
        low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries, num_keys, seed,
        rows_M, drop, False, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip
    dq_MD = _queries_visit(
        dq_MD, q_MD, do_MD, lse_M, delta_M, k_base, v_base, whole_end, some_high, queries_M,
        low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries, num_keys, seed,
        rows_M, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip
    places = batch * dq_batch_stride + head * dq_head_stride
    dq_places = dq_ptr + places + places_M[:, None] * dq_row_stride + channels_D[None, :]
    tl.store(dq_places, (dq_MD * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dbias_ptr,
    low_ptr, high_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    low_stride, bias_stride, num_batches, num_heads, group_size, num_queries, num_keys, scale, softcap, drop,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M neighbouring distances of one head's bias table, over all rows and queries.

    Distance e of query t is key t + e - (T - 1), so the tile of queries [t0, t0 + M) meets M distances in two tiles of
    M keys, along diagonals: those are gathered into columns and summed.
    """
    ALIBI: tl.constexpr = slopes_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group_size
    entry = tl.program_id(0) * BLOCK_M
    steps_M = tl.arange(0, BLOCK_M)
    channels_D = tl.arange(0, BLOCK_D)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    diagonal_MM = steps_M[:, None] + steps_M[None, :]
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Only these queries have keys at the program's distances.
    begin = tl.maximum(num_queries - entry - 2 * BLOCK_M, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(num_queries + num_keys - 1 - entry, num_queries)
    for index in range(num_batches):
        batch = index + tl.zeros([], dtype=tl.int64)
        rows = (batch * num_heads + head) * num_queries
        q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
        do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
        k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
        v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride
        for start in range(begin, end, BLOCK_M):
            queries_M = start + steps_M
            row_inside = queries_M < num_queries
            inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
            places_M = queries_M.to(tl.int64)
            q_MD = tl.load(q_base + places_M[:, None] * q_row_stride + channels_D[None, :], mask=inside, other=0.0)
            do_MD = tl.load(do_base + places_M[:, None] * do_row_stride + channels_D[None, :], mask=inside, other=0.0)
            lse_M = tl.load(lse2_ptr + rows + places_M, mask=row_inside, other=float("inf"))
            delta_M = tl.load(delta_ptr + rows + places_M, mask=row_inside, other=0.0)
            low_M = tl.load(low_ptr + batch * low_stride + places_M, mask=row_inside, other=0)
            high_M = tl.load(high_ptr + batch * low_stride + places_M, mask=row_inside, other=0)
            for half in tl.static_range(2):
                keys_M = start + entry - (num_queries - 1) + half * BLOCK_M + steps_M
                key_places_M = keys_M.to(tl.int64)
                key_inside = ((keys_M >= 0) & (keys_M < num_keys))[:, None] & (channels_D[None, :] < HEAD_DIM)
                k_MD = tl.load(
                    k_base + key_places_M[:, None] * k_row_stride + channels_D[None, :], mask=key_inside, other=0.0
                )
                v_MD = tl.load(
                    v_base + key_places_M[:, None] * v_row_stride + channels_D[None, :], mask=key_inside, other=0.0
                )
                zeros_MM = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
                product_MM = dot(q_MD, tl.trans(k_MD), zeros_MM)
                dp_MM = dot(do_MD, tl.trans(v_MD), zeros_MM)
                _, ds_MM = _tile_gradient(
                    product_MM, dp_MM, lse_M[:, None], delta_M[:, None], queries_M[:, None], keys_M[None, :],
                    low_M[:, None], high_M[:, None], slope, bias_ptr + head * bias_stride, scale, softcap, num_queries,
                    num_keys, seed, ((rows + places_M) * num_keys)[:, None], drop, True, SOFTCAP, ALIBI, True, DROPOUT,
                )  # fmt: skip
                column_MM = diagonal_MM - half * BLOCK_M
                found = (column_MM >= 0) & (column_MM < BLOCK_M)
                gathered_MM = tl.gather(ds_MM, tl.where(found, column_MM, 0), 1)
                total_M += tl.sum(tl.where(found, gathered_MM, 0.0), axis=0)
    entries_M = entry + steps_M
    inside_M = entries_M < num_queries + num_keys - 1
    tl.store(dbias_ptr + head * (num_queries + num_keys - 1) + entries_M, total_M, mask=inside_M)


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    width = next_power_of_2(max(16, shape["exact_D"]))
    if target.interpreted:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16})
    if dtype == torch.float32:
        size = 32 if width <= 64 else 16
        return Config({"BLOCK_M": size, "BLOCK_N": size}, num_warps=4, num_stages=1)
    if target.is_amd:
        size = {64: 64, 128: 32, 256: 16}[max(64, width)]
        return Config({"BLOCK_M": size, "BLOCK_N": size}, num_warps=4, num_stages=1)
    if target.arch == "sm_90" or target.arch.startswith("sm_10"):
        rows, keys, warps, stages = {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 64, 8, 1)}[max(64, width)]
    else:
        rows, keys, warps, stages = {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)}[max(64, width)]
    if shape["exact_pass"]:
        rows, keys = keys, rows
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)
        for rows in (32, 64, 128)
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]


BACKWARD = Tunable("attention_backward", _rule, _candidates)


def launch_backward(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, o_BHTD: Tensor, lse_BHT: Tensor, do_BHTD: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv (laid out as [B, T, H, D]), dbias_HR (empty without a table) and delta_BHT, both fp32."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    target = target_of(q_BHTD)
    dtype = q_BHTD.dtype
    dq_BHTD = q_BHTD.new_empty(B, T, H, D, dtype=result_dtype(dtype)).transpose(1, 2)
    dk_BKSD, dv_BKSD = (q_BHTD.new_empty(B, S, K, D, dtype=result_dtype(dtype)).transpose(1, 2) for _ in range(2))
    delta_BHT, lse2_BHT = torch.empty_like(lse_BHT), torch.empty_like(lse_BHT)
    entries = 0 if options.bias_HR is None else T + S - 1
    dbias_HR = q_BHTD.new_zeros(H, entries, dtype=torch.float32) if entries else q_BHTD.new_empty(0)
    if S == 0 or T == 0:
        return dq_BHTD.zero_().to(dtype), dk_BKSD.zero_().to(dtype), dv_BKSD.zero_().to(dtype), dbias_HR, delta_BHT
    common = common_arguments(q_BHTD, k_BKSD, v_BKSD, options)
    rows = Config({"BLOCK_M": 16 if target.interpreted else 64}, num_warps=4)
    prepare = {
        "o_ptr": o_BHTD,
        "do_ptr": do_BHTD,
        "lse_ptr": lse_BHT,
        "delta_ptr": delta_BHT,
        "lse2_ptr": lse2_BHT,
        **strides("o", o_BHTD),
        **strides("do", do_BHTD),
        **{name: common[name] for name in ("num_heads", "num_queries", "HEAD_DIM", "BLOCK_D")},
    }
    launch(_prepare_kernel, (ceil_div(T, rows.blocks["BLOCK_M"]), H, B), rows, prepare)
    common |= {"do_ptr": do_BHTD, "lse2_ptr": lse2_BHT, "delta_ptr": delta_BHT, **strides("do", do_BHTD)}
    config = BACKWARD.pick(dtype, target, T=T, S=S, exact_D=D, exact_pass=0)
    keys = {
        "dk_ptr": dk_BKSD,
        "dv_ptr": dv_BKSD,
        **strides("dk", dk_BKSD),
        "first_ptr": options.first_BS,
        "last_ptr": options.last_BS,
        "first_stride": options.first_BS.stride(0) if options.first_BS.shape[0] > 1 else 0,
    }
    launch(_keys_kernel, (ceil_div(S, config.blocks["BLOCK_N"]), K, B), config, common | keys)
    config = BACKWARD.pick(dtype, target, T=T, S=S, exact_D=D, exact_pass=1)
    queries = {"dq_ptr": dq_BHTD, **strides("dq", dq_BHTD)}
    launch(_queries_kernel, (ceil_div(T, config.blocks["BLOCK_M"]), H, B), config, common | queries)
    if entries:
        size = 16 if target.interpreted or D > 128 else 32
        config = Config({"BLOCK_M": size}, num_warps=4, num_stages=1)
        bias = {"dbias_ptr": dbias_HR, "num_batches": B}
        wanted = {name: value for name, value in common.items() if name != "LOWER"}
        launch(_bias_kernel, (ceil_div(entries, size), H), config, wanted | bias)
    return rounded(dq_BHTD, dtype), rounded(dk_BKSD, dtype), rounded(dv_BKSD, dtype), dbias_HR, delta_BHT
