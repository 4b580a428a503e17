"""Attention of new tokens over a paged cache: decoding and chunked prefill, mixed in one call.

    o = softmax(scale * q k^T) v      over the keys of the token's own request, up to its own position

The keys and values of a request lie in blocks of a pool, found through its row of a block table; the newest of them
belong to the tokens of this call (they are written before). Query token i of the last T tokens of a sequence of length
L stands at position L - T + i and sees the keys 0 .. L - T + i, or the last `window` + 1 of them. A pool may be
quantized (int8, fp8 e4m3) with one scale per slot and head; keys and values are never dequantized in memory: their
scales multiply the scores and the weights.

Where there are too few tiles to fill the device (small batches of long sequences), the keys are split among as many
programs as it holds at a time, and the parts are merged in order, by a second kernel or by the last program of a tile.
The number of splits follows from that of tiles, so that speed does not fall off a cliff at some batch size. With
`split_size` the splits begin at fixed places, merging follows their order, and one launch configuration serves all:
then the bits of a row depend on nothing but its own keys, not on the batch, the chunks of a prefill, or the splitting.

Shapes: N tokens of R requests end to end, H query heads, K key/value heads (H a multiple of K), D head dimension,
P blocks of S slots, M entries of a table row. Bytes: 2 K D b per key of each request, read once per tile of its tokens;
4 H D FLOPs per token and key. Sources: Kwon et al. 2023 (arXiv 2309.06180); Dao et al. 2023 (flash decoding).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.attention import attend_single, can_attend
from trine.kernels.cpu.invariant import attend_invariant, check_invariant
from trine.kernels.hardware import CHECKING
from trine.kernels.launch import ceil_div
from trine.kernels.operation import run
from trine.kernels.paged_attention.launcher import paged_attention_forward
from trine.kernels.paged_attention.reference import gathered, paged_attention_reference, visible_keys
from trine.kernels.target import target_of, uses_triton

MAX_HEAD_DIM = 256
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def paged_attention(
    q_NHD: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    *,
    block_table_RM: Tensor,
    lengths_R: Tensor,
    query_starts: Tensor,
    max_queries: int,
    max_length: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
    split_size: int | None = None,
    tables_checked: bool = False,
) -> Tensor:
    """o_NHD in the dtype of q. No gradients.

    `lengths_R` (int32): keys of each request, those of this call included. `query_starts` (int32, [R + 1]): request r
    has the tokens query_starts[r] <= n < query_starts[r + 1]. `max_queries`, `max_length`: upper bounds of the tokens
    and keys of any request, known to the caller, so that no device is waited for. `window`: keys before its own that a
    token sees. `k_scale_PSK`, `v_scale_PSK`: fp32, for a quantized pool and only there. `split_size`: keys per split, a
    multiple of 64, for batch-invariant bits; None lets the kernel choose. On a CPU any number selects the loops of
    `cpu/invariant.py`, which need no splits.

    Raises ValueError for what does not fit, by name, and with `split_size` on a CPU where those loops cannot be used.
    That table entries and lengths lie within the pool is checked on a CPU, and on a GPU with TRINE_CHECK_KERNELS=1 (it
    waits for the device), unless `tables_checked` says that the caller has called `check_tables` on them (once for all
    layers).
    """
    _check(q_NHD, k_cache_PSKD, v_cache_PSKD, block_table_RM, lengths_R, query_starts)
    check_options(q_NHD, max_queries, max_length, window, softcap, sinks_H, split_size)
    _check_scales(q_NHD, k_cache_PSKD, k_scale_PSK, v_scale_PSK)
    if not tables_checked and (CHECKING or not q_NHD.is_cuda):
        check_tables(k_cache_PSKD, block_table_RM, lengths_R, query_starts, max_queries, max_length, len(q_NHD))
    scale = q_NHD.shape[2] ** -0.5 if scale is None else scale
    if uses_triton(q_NHD):
        o_NHD: Tensor = run(paged_attention_forward,
            q_NHD, k_cache_PSKD, v_cache_PSKD, block_table_RM, lengths_R, query_starts, sinks_H, k_scale_PSK,
            v_scale_PSK, max_queries, max_length, scale, window, softcap or 0.0, split_size or 0,
        )  # fmt: skip
        return o_NHD
    options: dict[str, Any] = {
        "block_table_RM": block_table_RM, "lengths_R": lengths_R, "scale": scale, "window": window, "softcap": softcap,
        "sinks_H": sinks_H, "k_scale_PSK": k_scale_PSK, "v_scale_PSK": v_scale_PSK,
    }  # fmt: skip
    if split_size is not None:
        check_invariant(q_NHD.dtype, k_cache_PSKD.dtype)
        return attend_invariant(q_NHD, k_cache_PSKD, v_cache_PSKD, starts=query_starts.tolist(), **options)
    return _on_cpu(q_NHD, k_cache_PSKD, v_cache_PSKD, query_starts, options)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, options: dict[str, Any]) -> Tensor:
    """Requests of one new token by compiled loops where they can be used (`cpu/attention.py`); the others by torch."""
    starts = query_starts.tolist()
    spans = {row: span for row, span in enumerate(pairwise(starts)) if span[0] < span[1]}
    single = {row: begin for row, (begin, end) in spans.items() if end - begin == 1}
    uncommon = options["softcap"] is not None or options["sinks_H"] is not None  # what torch's attention has not
    if not single or not can_attend(q, k) or (uncommon and len(single) < len(spans)):
        single = {}
    if uncommon and not single:
        return paged_attention_reference(q, k, v, query_starts=query_starts, **options)
    o_NHD = torch.empty_like(q, memory_format=torch.contiguous_format)
    if single:
        attend_single(q, k, v, o_NHD, requests=list(single), tokens=list(single.values()), **options)
    rest = {row: span for row, span in spans.items() if row not in single}
    caches = (k, options["k_scale_PSK"]), (v, options["v_scale_PSK"])
    _by_torch(
        q, caches, o_NHD, rest, options["block_table_RM"], options["lengths_R"], options["scale"], options["window"]
    )
    return o_NHD


def _by_torch(
    q_NHD: Tensor,
    caches: tuple[tuple[Tensor, Tensor | None], ...],
    o_NHD: Tensor,
    spans: dict[int, tuple[int, int]],
    block_table_RM: Tensor,
    lengths_R: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Request by request: its keys and values gathered, torch's scaled_dot_product_attention on them."""
    for row, (begin, end) in spans.items():
        length = int(lengths_R[row])
        k_KLD, v_KLD = (gathered(x, s, block_table_RM[row], length, q_NHD.dtype).to(q_NHD.dtype) for x, s in caches)
        whole = window is None and end - begin in (1, length)
        o_HTD = F.scaled_dot_product_attention(
            q_NHD[begin:end].transpose(0, 1)[None],
            k_KLD[None],
            v_KLD[None],
            attn_mask=None if whole else visible_keys(end - begin, length, window, q_NHD.device),
            is_causal=whole and end - begin > 1,
            scale=scale,
            enable_gqa=True,
        )
        o_NHD[begin:end] = o_HTD[0].transpose(0, 1)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, starts: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or k.shape[3] != q.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q and the caches have shapes {shapes}; expected [N, H, D] and twice [P, S, K, D]")
    if q.shape[1] == 0 or k.shape[2] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into groups over {k.shape[2]} key/value heads")
    block_size = k.shape[1]
    if not 16 <= block_size <= 256 or block_size & (block_size - 1):
        raise ValueError(f"blocks have {block_size} slots; supported are 16, 32, 64, 128 and 256")
    for name, x in (("block_table", table), ("lengths", lengths), ("query_starts", starts)):
        if x.dtype != torch.int32:
            raise ValueError(f"{name} is {x.dtype}; it must be int32")
    R = len(lengths)
    if lengths.dim() != 1 or table.dim() != 2 or table.shape[0] != R or tuple(starts.shape) != (R + 1,):
        raise ValueError(
            f"block_table {tuple(table.shape)}, lengths {tuple(lengths.shape)} and query_starts {tuple(starts.shape)} "
            "do not fit; expected [R, M], [R] and [R + 1]"
        )
    if any(x.stride(-1) != 1 for x in (q, k, v, table)):
        raise ValueError("q, the caches and block_table must be contiguous in their last dimension")


def check_options(
    q_NHD: Tensor,
    max_queries: int,
    max_length: int,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    split_size: int | None,
) -> None:
    """Raises ValueError for numbers that cannot be, and for q that the kernel does not take."""
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; give the number of keys before a token's own, or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
    if sinks is not None and tuple(sinks.shape) != (q_NHD.shape[1],):
        raise ValueError(f"sinks_H has shape {tuple(sinks.shape)}; expected ({q_NHD.shape[1]},)")
    if split_size is not None and (split_size < 64 or split_size % 64):
        raise ValueError(f"split_size is {split_size}; it must be a positive multiple of 64, or None")
    if max_queries < 0 or max_length < max_queries:
        raise ValueError(f"max_queries {max_queries} and max_length {max_length} do not fit: keys include the queries'")
    if uses_triton(q_NHD) and (
        q_NHD.shape[2] > MAX_HEAD_DIM or q_NHD.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"head size {q_NHD.shape[2]} in {q_NHD.dtype} is not supported by the kernel; at most {MAX_HEAD_DIM}, in "
            "float32, bfloat16 or float16"
        )


def _check_scales(q: Tensor, k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    quantized = k.dtype in QUANTIZED
    if not quantized and k.dtype != q.dtype:
        raise ValueError(
            f"q is {q.dtype} but the caches are {k.dtype}; they must agree, or the caches be int8 or fp8 e4m3"
        )
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scales is not None) != quantized:
            raise ValueError(f"{name} is {'missing for' if quantized else 'given with'} caches of {k.dtype}")
        if scales is not None and (scales.dtype != torch.float32 or scales.shape != k.shape[:3]):
            raise ValueError(f"{name} is {scales.dtype} {tuple(scales.shape)}; expected float32 {tuple(k.shape[:3])}")
        if scales is not None and not scales.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if k.dtype == torch.float8_e4m3fn and q.is_cuda:
        target = target_of(q)
        if target.is_amd or int(target.arch.removeprefix("sm_")) < 89:
            raise ValueError(f"fp8 caches are not supported on {target.arch}; use int8 there")


def check_tables(
    k_cache_PSKD: Tensor,
    block_table_RM: Tensor,
    lengths_R: Tensor,
    query_starts: Tensor,
    max_queries: int,
    max_length: int,
    num_tokens: int,
) -> None:
    """Raise ValueError unless every key is inside the pool and the counts are what they are said to be."""
    starts, lengths = query_starts.tolist(), lengths_R.tolist()
    counts = [after - before for before, after in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != num_tokens or min(counts, default=0) < 0:
        raise ValueError(f"query_starts runs from {starts[0]} to {starts[-1]}; it must ascend from 0 to {num_tokens}")
    num_blocks, block_size = k_cache_PSKD.shape[:2]
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count == 0:
            continue
        if count > max_queries or length > max_length:
            raise ValueError(
                f"request {row} has {count} tokens and {length} keys, more than max_queries {max_queries} or "
                f"max_length {max_length}"
            )
        if not count <= length <= block_table_RM.shape[1] * block_size:
            raise ValueError(
                f"request {row} has {count} tokens and {length} keys; its table of {block_table_RM.shape[1]} blocks of "
                f"{block_size} holds {block_table_RM.shape[1] * block_size}"
            )
        used = block_table_RM[row, : ceil_div(length, block_size)]
        outside = used[(used < 0) | (used >= num_blocks)]
        if len(outside):
            raise ValueError(f"the table of request {row} names block {int(outside[0])}; the pool has {num_blocks}")
