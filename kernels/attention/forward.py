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

from trine.kernels.attention.options import Options, common_arguments, strides
from trine.kernels.attention.tile import LOG2E, keep_factors, tile_scores
from trine.kernels.language import dot, narrow
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def _visit(
    acc_MD,
    sums_M,
    tops_M,
    q_MD,
    k_ptr,
    v_ptr,
    begin,
    end,
    queries_M,
    low_M,
    high_M,
    slope,
    bias_ptr,
    k_stride,
    v_stride,
    scale,
    softcap,
    num_queries,
    num_keys,
    seed,
    rows_M,
    drop,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Take the tiles of keys in [begin, end) into the running output, sums and maxima of the rows."""
    channels_D = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys_N = start + tl.arange(0, BLOCK_N)
        places_N = keys_N.to(tl.int64)
        inside = (keys_N < num_keys)[:, None]
        if HEAD_DIM < BLOCK_D:
            inside = inside & (channels_D[None, :] < HEAD_DIM)
        if MASKED or HEAD_DIM < BLOCK_D:
            k_ND = tl.load(k_ptr + places_N[:, None] * k_stride + channels_D[None, :], mask=inside, other=0.0)
        else:
            k_ND = tl.load(k_ptr + places_N[:, None] * k_stride + channels_D[None, :])
        product_MN = dot(q_MD, tl.trans(k_ND), tl.zeros([q_MD.shape[0], BLOCK_N], dtype=tl.float32))
        scores_MN, _ = tile_scores(
            product_MN,
            queries_M[:, None],
            keys_N[None, :],
            low_M[:, None],
            high_M[:, None],
            slope,
            bias_ptr,
            scale,
            softcap,
            num_queries,
            num_keys,
            MASKED,
            SOFTCAP,
            ALIBI,
            BIAS,
        )
        new_tops_M = tl.maximum(tops_M, tl.max(scores_MN, axis=1))
        # A row that has seen no key keeps -inf; there 0 is subtracted, for -inf - -inf is not a number.
        safe_M = tl.where(new_tops_M == float("-inf"), 0.0, new_tops_M)
        p_MN = tl.exp2(scores_MN - safe_M[:, None])
        shrink_M = tl.exp2(tops_M - safe_M)
        sums_M = sums_M * shrink_M + tl.sum(p_MN, axis=1)
        tops_M = new_tops_M
        if DROPOUT:
            p_MN *= keep_factors(seed, rows_M[:, None], keys_N[None, :], drop, DROPOUT)
        if MASKED or HEAD_DIM < BLOCK_D:
            v_ND = tl.load(v_ptr + places_N[:, None] * v_stride + channels_D[None, :], mask=inside, other=0.0)
        else:
            v_ND = tl.load(v_ptr + places_N[:, None] * v_stride + channels_D[None, :])
        acc_MD = dot(narrow(p_MN, v_ND), v_ND, acc_MD * shrink_M[:, None])
    return acc_MD, sums_M, tops_M


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    low_ptr,
    high_ptr,
    sinks_ptr,
    slopes_ptr,
    bias_ptr,
    seed_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    o_batch_stride,
    o_head_stride,
    o_row_stride,
    low_stride,
    bias_stride,
    num_heads,
    group_size,
    num_queries,
    num_keys,
    scale,
    softcap,
    drop,
    SOFTCAP: tl.constexpr,
    LOWER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ALIBI: tl.constexpr = slopes_ptr is not None
    BIAS: tl.constexpr = bias_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group_size
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    queries_M = first + tl.arange(0, BLOCK_M)
    channels_D = tl.arange(0, BLOCK_D)
    row_inside = queries_M < num_queries
    inside = row_inside[:, None] & (channels_D[None, :] < HEAD_DIM)
    places_M = queries_M.to(tl.int64)

    q_base = q_ptr + batch * q_batch_stride + head.to(tl.int64) * q_head_stride
    q_MD = tl.load(q_base + places_M[:, None] * q_row_stride + channels_D[None, :], mask=inside, other=0.0)
    k_base = k_ptr + batch * k_batch_stride + kv_head.to(tl.int64) * k_head_stride
    v_base = v_ptr + batch * v_batch_stride + kv_head.to(tl.int64) * v_head_stride

    # Rows past the end repeat the last one's bounds, so that they widen no range.
    bounds_M = batch * low_stride + tl.minimum(queries_M, num_queries - 1)
    low_M = tl.load(low_ptr + bounds_M)
    high_M = tl.load(high_ptr + bounds_M)
    some_high, all_high = tl.max(high_M, axis=0), tl.min(high_M, axis=0)
    begin = 0
    whole_begin = 0
    if LOWER:
        some_low, all_low = tl.min(low_M, axis=0), tl.max(low_M, axis=0)
        begin = (some_low // BLOCK_N) * BLOCK_N
        whole_begin = tl.cdiv(all_low, BLOCK_N) * BLOCK_N
    whole_end = tl.maximum((all_high // BLOCK_N) * BLOCK_N, whole_begin)

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head).to(tl.float32)
    bias_base = bias_ptr
    if BIAS:
        bias_base = bias_ptr + head.to(tl.int64) * bias_stride
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    rows_M = ((batch * num_heads + head) * num_queries + places_M) * num_keys

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
            queries_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries,
            num_keys, seed, rows_M, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
    acc_MD, sums_M, tops_M = _visit(
        acc_MD, sums_M, tops_M, q_MD, k_base, v_base, whole_begin, whole_end,
        queries_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries,
        num_keys, seed, rows_M, drop, False, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip
    acc_MD, sums_M, tops_M = _visit(
        acc_MD, sums_M, tops_M, q_MD, k_base, v_base, whole_end, some_high,
        queries_M, low_M, high_M, slope, bias_base, k_row_stride, v_row_stride, scale, softcap, num_queries,
        num_keys, seed, rows_M, drop, True, HEAD_DIM, BLOCK_D, BLOCK_N, SOFTCAP, ALIBI, BIAS, DROPOUT,
    )  # fmt: skip

    # A row without keys: output 0, log-sum-exp -inf.
    divisor_M = tl.where(sums_M > 0.0, sums_M, 1.0)
    o_MD = acc_MD / divisor_M[:, None]
    lse_M = (tops_M + tl.log2(divisor_M)) / LOG2E
    o_base = o_ptr + batch * o_batch_stride + head.to(tl.int64) * o_head_stride
    o_places = o_base + places_M[:, None] * o_row_stride + channels_D[None, :]
    tl.store(o_places, o_MD.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (batch * num_heads + head) * num_queries + places_M, lse_M, mask=row_inside)


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    width = next_power_of_2(max(16, shape["exact_D"]))
    if target.interpreted:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16})
    if dtype == torch.float32:
        return Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4 if width <= 128 else 8, num_stages=1)
    if target.is_amd:
        return Config({"BLOCK_M": 128, "BLOCK_N": 64 if width <= 64 else 32}, num_warps=4, num_stages=1)
    if target.arch == "sm_90" or target.arch.startswith("sm_10"):
        sizes = {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)}
    else:
        sizes = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)}
    rows, keys, warps, stages = sizes[max(64, width)]
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)
        for rows in (64, 128)
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]


FORWARD = Tunable("attention_forward", _rule, _candidates)


def launch_forward(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o_BHTD, laid out as [B, T, H, D], and the natural log-sum-exp of the scores: fp32 [B, H, T]."""
    B, H, T, D = q_BHTD.shape
    o_BHTD = q_BHTD.new_empty(B, T, H, D, dtype=result_dtype(q_BHTD.dtype)).transpose(1, 2)
    lse_BHT = q_BHTD.new_empty(B, H, T, dtype=torch.float32)
    if k_BKSD.shape[2] == 0:
        sink = float("-inf") if options.sinks_H is None else options.sinks_H.float()[:, None]
        return torch.zeros_like(o_BHTD, dtype=q_BHTD.dtype), lse_BHT.copy_(torch.as_tensor(sink).expand_as(lse_BHT))
    config = FORWARD.pick(q_BHTD.dtype, target_of(q_BHTD), T=T, S=k_BKSD.shape[2], exact_D=D)
    arguments: dict[str, Any] = {
        **common_arguments(q_BHTD, k_BKSD, v_BKSD, options),
        "o_ptr": o_BHTD,
        "lse_ptr": lse_BHT,
        "sinks_ptr": options.sinks_H,
        **strides("o", o_BHTD),
    }
    launch(_forward_kernel, (ceil_div(T, config.blocks["BLOCK_M"]), H, B), config, arguments)
    return rounded(o_BHTD, q_BHTD.dtype), lse_BHT
