"""The gradient of a table of biases by distance: sums of dS along diagonals.

Distance e of query t is key t + e - (T - 1), so a tile of queries [t0, t0 + M) meets M neighbouring distances in two
tiles of M keys, along their diagonals: those are gathered into columns and summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.attention.tile import between, keep_factors, load_tile, query_bounds, tile_scores
from trine.kernels.language import dot


@triton.jit
def _load_keys(ptr, keys_M, stride, num_keys, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of these keys; zeros before the first and past the last."""
    channels_D = tl.arange(0, BLOCK_D)
    inside = ((keys_M >= 0) & (keys_M < num_keys))[:, None] & (channels_D < HEAD_DIM)[None, :]
    places = keys_M.to(tl.int64)[:, None] * stride + channels_D[None, :]
    return tl.load(ptr + places, mask=inside, other=0.0)


@triton.jit
def bias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dbias_ptr,
    low_ptr, high_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    low_stride, bias_stride, num_batches, num_heads, group_size, num_queries, padded_queries, num_keys, scale, softcap,
    drop,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M neighbouring distances of one head, over all rows of the batch and queries."""
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group_size
    entry = tl.program_id(0) * BLOCK_M
    steps_M = tl.arange(0, BLOCK_M)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    diagonal_MM = steps_M[:, None] + steps_M[None, :]
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Only these queries have keys at the program's distances.
    begin = tl.maximum(num_queries - entry - 2 * BLOCK_M, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(num_queries + num_keys - 1 - entry, num_queries)
    for index in range(num_batches):
        batch = tl.cast(index, tl.int64)
        plane = (batch * num_heads + head).to(tl.int32)
        rows = (batch * num_heads + head) * padded_queries
        q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
        do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
        k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
        v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride
        low_base, high_base = low_ptr, high_ptr
        if low_ptr is not None:
            low_base, high_base = low_ptr + batch * low_stride, high_ptr + batch * low_stride
        for start in range(begin, end, BLOCK_M):
            queries_M = start + steps_M
            q_MD = load_tile(q_base, start, q_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
            do_MD = load_tile(do_base, start, do_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
            lse_M = tl.load(lse_ptr + rows + queries_M)
            delta_M = tl.load(delta_ptr + rows + queries_M)
            low_M, high_M = query_bounds(low_base, high_base, queries_M, num_queries, num_keys, CAUSAL)
            for half in tl.static_range(2):
                keys_M = start + entry - (num_queries - 1) + half * BLOCK_M + steps_M
                k_MD = _load_keys(k_base, keys_M, k_row_stride, num_keys, HEAD_DIM, BLOCK_D)
                v_MD = _load_keys(v_base, keys_M, v_row_stride, num_keys, HEAD_DIM, BLOCK_D)
                zeros_MM = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
                product_MM = dot(q_MD, tl.trans(k_MD), zeros_MM)
                dp_MM = dot(do_MD, tl.trans(v_MD), zeros_MM)
                scores_MM, unit, _ = tile_scores(
                    product_MM, queries_M[:, None], queries_M[:, None], keys_M[None, :], 0.0,
                    bias_ptr + head * bias_stride, scale, softcap, num_queries, num_keys, SOFTCAP, False, True,
                )  # fmt: skip
                if DROPOUT:
                    dp_MM *= keep_factors(seed, plane, queries_M[:, None], keys_M[None, :], drop)
                p_MM = tl.exp2(scores_MM * unit - lse_M[:, None])
                p_MM = tl.where(between(keys_M[None, :], low_M[:, None], high_M[:, None]), p_MM, 0.0)
                ds_MM = p_MM * (dp_MM - delta_M[:, None])
                column_MM = diagonal_MM - half * BLOCK_M
                found = (column_MM >= 0) & (column_MM < BLOCK_M)
                gathered_MM = tl.gather(ds_MM, tl.where(found, column_MM, 0), 1)
                total_M += tl.sum(tl.where(found, gathered_MM, 0.0), axis=0)
    entries_M = entry + steps_M
    inside_M = entries_M < num_queries + num_keys - 1
    tl.store(dbias_ptr + head * (num_queries + num_keys - 1) + entries_M, total_M, mask=inside_M)
