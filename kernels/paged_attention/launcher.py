"""Launching paged attention: configurations, the number of splits, registration, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.last_program import counters, in_one_launch
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.paged_attention.kernels import attend_kernel, merge_kernel
from trine.kernels.samples import Sample, meta
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

# Partial results of splits take at most this much memory; beyond it tiles take their splits one after the other.
_PART_BYTES = 2**28
# No split is shorter: a program has to read some keys to be worth starting and merging.
_SHORTEST_SPLIT = 256
# Fused multiply-adds only where they are written: a compiler fuses the score and its maximum in the loop without a mask
# and cannot in the others, so that bits would depend on which of the loops takes a key.
_OPTIONS = {"enable_fp_fusion": False}


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    """By Q, the longest chunk of queries (64 where bits must not depend on it), heads of a group, D, bytes of a key."""
    fewest = max(16, next_power_of_2(shape["exact_G"]))
    if target.interpreted:
        return Config({"BLOCK_M": fewest, "BLOCK_N": 16})
    if dtype == torch.float32:
        return Config({"BLOCK_M": fewest, "BLOCK_N": 16}, num_warps=8, num_stages=1)
    rows = max(fewest, min(64, next_power_of_2(min(shape["Q"], 64) * shape["exact_G"])))
    if target.is_amd:
        return Config({"BLOCK_M": rows, "BLOCK_N": 32}, num_warps=4, num_stages=1)
    if rows >= 64:
        # Two accumulators of 64 rows, of a split and of the sum of splits: eight warps, or they spill.
        return Config({"BLOCK_M": rows, "BLOCK_N": 32 if shape["D"] > 128 or target.arch == "sm_80" else 64}, 8, 2)
    if target.is_hopper and 64 < shape["D"] <= 128 and shape["exact_bytes"] == dtype.itemsize and rows == 16:
        return Config({"BLOCK_M": rows, "BLOCK_N": 128}, num_warps=4, num_stages=2)
    warps = 8 if shape["D"] <= 64 or shape["exact_bytes"] < dtype.itemsize else 4
    return Config({"BLOCK_M": rows, "BLOCK_N": 32 if shape["D"] > 128 else 64}, warps, num_stages=3)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    fewest = max(16, next_power_of_2(shape["exact_G"]))
    return [
        Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)
        for rows in (16, 32, 64, 128)
        for keys in (16, 32, 64, 128)
        for warps in (2, 4, 8)
        for stages in (1, 2, 3)
        if rows >= fewest
    ]


FORWARD = Tunable("paged_attention", _rule, _candidates)


def programs_per_sm(config: Config, dtype: torch.dtype, D: int) -> int:
    """How many programs a multiprocessor can hold at a time, or two where it can hold more.

    Registers decide: four warps of 255 each fit twice, eight only with small heads or fp32, whose tiles are small. A
    test compares with `aot.json`.
    """
    return 2 if config.num_warps <= 4 or D <= 64 or dtype == torch.float32 else 1


def _num_splits(programs: int, max_length: int, per_sm: int, target: Target) -> int:
    """As many as run at a time on all multiprocessors, none shorter than it is worth.

    One program more than fit would begin when the others end, and double the time.
    """
    fitting = per_sm * target.num_sms // max(1, programs)
    return max(1, min(fitting, ceil_div(max_length, _SHORTEST_SPLIT)))


def _launch(
    q_NHD: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    block_table_RM: Tensor,
    lengths_R: Tensor,
    query_starts: Tensor,
    sinks_H: Tensor | None,
    k_scale_PSK: Tensor | None,
    v_scale_PSK: Tensor | None,
    max_queries: int,
    max_length: int,
    scale: float,
    window: int | None,
    softcap: float,
    split_size: int,
) -> Tensor:
    """o_NHD. `softcap` 0 is none, `split_size` 0 lets the number of programs decide."""
    N, H, D = q_NHD.shape
    K, group, R = k_cache_PSKD.shape[2], H // k_cache_PSKD.shape[2], len(lengths_R)
    target = target_of(q_NHD)
    queries = 64 if split_size else max(1, max_queries)
    config = FORWARD.pick(q_NHD.dtype, target, Q=queries, exact_G=group, D=D, exact_bytes=k_cache_PSKD.itemsize)
    tokens = config.blocks["BLOCK_M"] // group
    # One token each; where bits must not depend on the batch one kernel serves all.
    single = max_queries == 1 and N == R and not split_size
    tiles = R if single else N // tokens + R if N else 0
    num_splits = ceil_div(max_length, split_size or 1)
    if not split_size:
        num_splits = _num_splits(min(tiles, N) * K, max_length, programs_per_sm(config, q_NHD.dtype, D), target)
    fits = 4 * N * H * num_splits * (D + 2) <= _PART_BYTES
    parallel = num_splits > 1 and fits and (not split_size or tiles * K < 2 * target.num_sms)
    if not parallel and not split_size:
        num_splits = 1
    o_NHD = torch.empty(q_NHD.shape, dtype=result_dtype(q_NHD.dtype), device=q_NHD.device)
    parts = q_NHD.new_empty(N * H * num_splits if parallel else 0, D, dtype=torch.float32)
    sums = parts.new_empty(2, parts.shape[0])
    sinks = None if sinks_H is None else sinks_H.contiguous()
    counter = counters(q_NHD, tiles * K) if parallel else None
    two_launches = parallel and counter is None
    block_d = next_power_of_2(max(16, D))
    # Rows of a tile that can hold a token, where its last program merges them.
    merged = 1 if counter is None else next_power_of_2((1 if max_queries == 1 else tokens) * group)
    common = {"sinks_ptr": sinks, "o_ptr": o_NHD, "num_heads": H, "num_splits": num_splits, "HEAD_DIM": D}
    common |= {"parts_ptr": parts if parallel else None, "BLOCK_D": block_d}
    common |= {"part_sums_ptr": sums[0] if parallel else None, "part_tops_ptr": sums[1] if parallel else None}
    common |= {"EARLY": target.starts_early and two_launches}
    common |= {"o_token_stride": o_NHD.stride(0), "o_head_stride": o_NHD.stride(1)}
    arguments: dict[str, Any] = {
        **common,
        "q_ptr": q_NHD,
        "k_ptr": k_cache_PSKD,
        "v_ptr": v_cache_PSKD,
        "k_scale_ptr": k_scale_PSK,
        "v_scale_ptr": v_scale_PSK,
        "table_ptr": block_table_RM,
        "lengths_ptr": lengths_R.contiguous(),
        "starts_ptr": query_starts.contiguous(),
        "q_token_stride": q_NHD.stride(0),
        "q_head_stride": q_NHD.stride(1),
        **_pool_strides("k", k_cache_PSKD),
        **_pool_strides("v", v_cache_PSKD),
        "scale_block_stride": 0 if k_scale_PSK is None else k_scale_PSK.stride(0),
        "scale_slot_stride": 0 if k_scale_PSK is None else k_scale_PSK.stride(1),
        "table_stride": block_table_RM.stride(0),
        "num_requests": R,
        "group_size": group,
        "split_size": split_size,
        "window": window or 0,
        "scale": scale,
        "softcap": softcap,
        "counter_ptr": counter,
        "PARALLEL": parallel,
        "SINGLE": single,
        "MERGED": merged,
        "TOGETHER": 1 if counter is None else _together(merged * block_d, config.num_warps),
        "WINDOW": window is not None,
        "SOFTCAP": softcap > 0,
        "PAGE": k_cache_PSKD.shape[1],
        "TOKENS": tokens,
    }
    launch(attend_kernel, (tiles, K, num_splits if parallel else 1), config, arguments, options=_OPTIONS)
    if two_launches:
        # One request of few tokens has few rows, and each waits for its splits: a program a row.
        merge = Config({"BLOCK_M": 1, "TOGETHER": _together(block_d, 1)}, 1, 1)
        options = {**_OPTIONS, "launch_pdl": True} if target.starts_early else _OPTIONS
        launch(merge_kernel, (N * H,), merge, {**common, "num_rows": N * H}, options=options)
    return rounded(o_NHD, q_NHD.dtype)


def _together(numbers: int, num_warps: int) -> int:
    """Of how many splits what they hold is on its way at a time: 64 registers of each thread."""
    return max(1, min(16, 64 * 32 * num_warps // numbers))


def _pool_strides(name: str, cache_PSKD: Tensor) -> dict[str, int]:
    block, slot, head, _ = cache_PSKD.stride()
    return {f"{name}_block_stride": block, f"{name}_slot_stride": slot, f"{name}_head_stride": head}


@torch.library.custom_op("trine::paged_attention", mutates_args=())
def paged_attention_forward(
    q_NHD: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    block_table_RM: Tensor,
    lengths_R: Tensor,
    query_starts: Tensor,
    sinks_H: Tensor | None,
    k_scale_PSK: Tensor | None,
    v_scale_PSK: Tensor | None,
    max_queries: int,
    max_length: int,
    scale: float,
    window: int | None,
    softcap: float,
    split_size: int,
) -> Tensor:
    """The registered operation: o_NHD, contiguous."""
    return _launch(
        q_NHD, k_cache_PSKD, v_cache_PSKD, block_table_RM, lengths_R, query_starts, sinks_H, k_scale_PSK, v_scale_PSK,
        max_queries, max_length, scale, window, softcap, split_size,
    )  # fmt: skip


@paged_attention_forward.register_fake
def _(q_NHD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q_NHD, memory_format=torch.contiguous_format)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    half, nvidia = torch.bfloat16, ("sm_80", "sm_90", "sm_100")
    for R, length in ((1, 65536), (4, 16384)):
        alone = _sample(f"decode {R} x {length // 1024}k", half, R=R, T=1, length=length)
        yield from (alone, in_one_launch(alone))
    ragged = _sample("2 x 8 of 32k sinks", half, R=2, T=8, length=32768, sinks=True)
    yield from (ragged, in_one_launch(ragged))
    yield _sample("decode 32 x 32k", half, R=32, T=1, length=32768)
    yield _sample("decode 256 x 4k", half, R=256, T=1, length=4096)
    yield _sample("decode 4 x 32k fixed splits", half, R=4, T=1, length=32768, split_size=512)
    yield _sample("training 4 x 4k fixed splits", half, R=4, T=4096, length=4096, split_size=512, S=1)
    yield _sample("prefill 8 x 512 of 4k", half, R=8, T=512, length=4096)
    yield _sample("decode head 256 window softcap", half, R=32, T=1, length=8192, D=256, window=4096, softcap=50.0)
    yield _sample("decode head 64 sinks", torch.float16, R=32, T=1, length=8192, D=64, window=127, sinks=True)
    yield _sample("decode int8", half, R=32, T=1, length=32768, cache=torch.int8)
    yield _sample("decode fp8", half, R=32, T=1, length=32768, cache=torch.float8_e4m3fn, targets=nvidia[1:])
    yield _sample("decode", torch.float32, R=32, T=1, length=4096)


def _sample(
    name: str,
    dtype: torch.dtype,
    *,
    R: int,
    T: int,
    length: int,
    D: int = 128,
    cache: torch.dtype | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: bool = False,
    split_size: int = 0,
    S: int = 16,
    targets: tuple[str, ...] = (),
) -> Sample:
    H, K = 32, 8
    pool = meta(R * length // S, S, K, D, dtype=cache or dtype)
    scales = None if cache is None else meta(*pool.shape[:3])
    table, lengths, starts = (meta(*shape, dtype=torch.int32) for shape in ((R, length // S), (R,), (R + 1,)))
    call = partial(
        _launch, meta(R * T, H, D, dtype=dtype), pool, pool, table, lengths, starts,
        meta(H, dtype=dtype) if sinks else None, scales, scales, T, length, D**-0.5, window, softcap, split_size,
    )  # fmt: skip
    return Sample(f"paged_attention {name}", dtype, call, targets=targets)
