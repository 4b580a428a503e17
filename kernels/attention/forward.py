"""The forward pass of flash attention: online softmax over tiles of keys.

One program computes a tile of queries of one head. It visits the keys from the smallest lower to the largest upper
bound of its rows; only tiles that reach beyond the largest lower or the smallest upper bound are masked, all others
are skipped or taken whole. So causal, window, packed and padded attention are one kernel. Tiles with more keys (later
queries, under a causal mask) start first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.attention.configs import FORWARD
from trine.kernels.attention.hopper import launch_hopper, selected
from trine.kernels.attention.options import Options, common_arguments, readable, shape_of, strides
from trine.kernels.attention.tile import (
    LOG2E,
    between,
    keep_factors,
    load_tile,
    query_bounds,
    query_places,
    store_tile,
    tile_scores,
)
from trine.kernels.language import dot, narrow
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.target import target_of


@triton.jit
def _visit(
    acc_MD, sums_M, tops_M, q_MD, k_ptr, v_ptr, begin, end, queries_M, places_M, low_M, high_M, slope, bias_ptr,
    k_stride, v_stride, scale, softcap, num_queries, num_keys, seed, plane, drop,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Take the tiles of keys in [begin, end) into the running output, sums and maxima of the rows."""
    for start in range(begin, end, BLOCK_N):
        keys_N = start + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_ptr, start, k_stride, num_keys, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        product_MN = dot(q_MD, tl.trans(k_ND), tl.zeros([q_MD.shape[0], BLOCK_N], dtype=tl.float32))
        scores_MN, unit, _ = tile_scores(
            product_MN, queries_M[:, None], places_M[:, None], keys_N[None, :], slope, bias_ptr, scale, softcap,
            num_queries, num_keys, SOFTCAP, ALIBI, BIAS,
        )  # fmt: skip
        if MASKED:
            scores_MN = tl.where(between(keys_N[None, :], low_M[:, None], high_M[:, None]), scores_MN, float("-inf"))
        new_tops_M = tl.maximum(tops_M, tl.max(scores_MN, axis=1) * unit)
        safe_M = new_tops_M
        if MASKED or BIAS:
            # A row that has seen no key keeps -inf; there 0 is subtracted, for -inf - -inf is not a number.
            safe_M = tl.where(new_tops_M == float("-inf"), 0.0, new_tops_M)
        p_MN = tl.exp2(scores_MN * unit - safe_M[:, None])
        shrink_M = tl.exp2(tops_M - safe_M)
        sums_M = sums_M * shrink_M + tl.sum(p_MN, axis=1)
        tops_M = new_tops_M
        if DROPOUT:
            p_MN *= keep_factors(seed, plane, queries_M[:, None], keys_N[None, :], drop)
        v_ND = load_tile(v_ptr, start, v_stride, num_keys, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        acc_MD = dot(narrow(p_MN, v_ND), v_ND, acc_MD * shrink_M[:, None])
    return acc_MD, sums_M, tops_M


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, low_ptr, high_ptr, position_ptr, sinks_ptr, slopes_ptr, bias_ptr, seed_ptr,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, o_batch_stride, o_head_stride, o_row_stride,
    low_stride, position_stride, bias_stride, num_heads, group_size, num_queries, num_keys, scale, softcap, drop,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, LOWER: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group_size
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    queries_M = first + tl.arange(0, BLOCK_M)
    q_base = q_ptr + batch * q_batch_stride + head * q_head_stride
    q_MD = load_tile(q_base, first, q_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    k_base = k_ptr + batch * k_batch_stride + kv_head * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head * v_head_stride

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

    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if sinks_ptr is None:
        tops_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        sums_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    else:
        # A sink is one more key, whose value is zero.
        tops_M = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        sums_M = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    if LOWER:
        acc_MD, sums_M, tops_M = _visit(
            acc_MD, sums_M, tops_M, q_MD, k_base, v_base, begin, tl.minimum(whole_begin, some_high),
            queries_M, places_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap,
            num_queries, num_keys, seed, plane, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS,
            DROPOUT,
        )  # fmt: skip
    acc_MD, sums_M, tops_M = _visit(
        acc_MD, sums_M, tops_M, q_MD, k_base, v_base, whole_begin, whole_end,
        queries_M, places_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries,
        num_keys, seed, plane, drop, False, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip
    acc_MD, sums_M, tops_M = _visit(
        acc_MD, sums_M, tops_M, q_MD, k_base, v_base, whole_end, some_high,
        queries_M, places_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries,
        num_keys, seed, plane, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip

    # A row without keys: output 0, log-sum-exp -inf.
    divisor_M = tl.where(sums_M > 0.0, sums_M, 1.0)
    o_MD = acc_MD / divisor_M[:, None]
    lse_M = (tops_M + tl.log2(divisor_M)) / LOG2E
    o_base = o_ptr + batch * o_batch_stride + head * o_head_stride
    store_tile(o_base, o_MD, first, o_row_stride, num_queries, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (batch * num_heads + head) * num_queries + queries_M, lse_M, mask=queries_M < num_queries)


def launch_forward(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o_BHTD, laid out as [B, T, H, D], and the natural log-sum-exp of the scores: fp32 [B, H, T]."""
    q_BHTD, k_BKSD, v_BKSD = readable(q_BHTD), readable(k_BKSD), readable(v_BKSD)
    if selected(q_BHTD, k_BKSD, v_BKSD, options):
        return launch_hopper(q_BHTD, k_BKSD, v_BKSD, options)
    B, H, T, D = q_BHTD.shape
    o_BHTD = q_BHTD.new_empty(B, T, H, D, dtype=result_dtype(q_BHTD.dtype)).transpose(1, 2)
    lse_BHT = q_BHTD.new_empty(B, H, T, dtype=torch.float32)
    if k_BKSD.shape[2] == 0:
        sink = torch.full_like(lse_BHT[0], float("-inf")) if options.sinks_H is None else options.sinks_H[:, None]
        return rounded(o_BHTD.zero_(), q_BHTD.dtype), lse_BHT.copy_(sink.expand_as(lse_BHT))
    config = FORWARD.pick(q_BHTD.dtype, target_of(q_BHTD), **shape_of(q_BHTD, k_BKSD, options))
    arguments: dict[str, Any] = {
        **common_arguments(q_BHTD, k_BKSD, v_BKSD, options),
        "o_ptr": o_BHTD,
        "lse_ptr": lse_BHT,
        "sinks_ptr": options.sinks_H,
        "LOWER": options.lower,
        **strides("o", o_BHTD),
    }
    launch(_forward_kernel, (ceil_div(T, config.blocks["BLOCK_M"]), H, B), config, arguments)
    return rounded(o_BHTD, q_BHTD.dtype), lse_BHT
