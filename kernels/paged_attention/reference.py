"""Attention over a paged cache by its formula: every request's keys are gathered, then `attention/reference.py`.

Shapes: N query tokens of R requests end to end, H query heads, K key/value heads, D head dimension, P blocks of S slots
in the pool, M entries of a block table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.kernels.attention.reference import attend


def paged_attention_reference(
    q_NHD: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    *,
    block_table_RM: Tensor,
    lengths_R: Tensor,
    query_starts: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
) -> Tensor:
    """As `trine.kernels.paged_attention.op.paged_attention`, request by request, in fp32 (fp64 for fp64 inputs)."""
    o_NHD = torch.zeros_like(q_NHD)
    starts = query_starts.tolist()
    for row, length in enumerate(lengths_R.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        k_KLD, v_KLD = (
            gathered(cache, scales, block_table_RM[row], length, q_NHD.dtype)
            for cache, scales in ((k_cache_PSKD, k_scale_PSK), (v_cache_PSKD, v_scale_PSK))
        )
        visible_TL = visible_keys(end - begin, length, window, q_NHD.device)
        o_HTD, _ = attend(
            q_NHD[begin:end].transpose(0, 1)[None],
            k_KLD[None],
            v_KLD[None],
            visible_BTS=visible_TL[None],
            scale=scale,
            softcap=softcap,
            sinks_H=sinks_H,
        )
        o_NHD[begin:end] = o_HTD[0].transpose(0, 1)
    return o_NHD


def gathered(cache_PSKD: Tensor, scale_PSK: Tensor | None, table_M: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` keys (or values) of a request, dequantized, in the order of the sequence: [K, length, D]."""
    num_blocks = -(-length // cache_PSKD.shape[1])
    blocks = table_M[:num_blocks].long()
    x_LKD = cache_PSKD[blocks].flatten(0, 1)[:length]
    if scale_PSK is not None:
        work = torch.promote_types(dtype, torch.float32)
        x_LKD = x_LKD.to(work) * scale_PSK[blocks].flatten(0, 1)[:length, :, None].to(work)
    return x_LKD.to(torch.promote_types(dtype, torch.float32) if scale_PSK is not None else dtype).transpose(0, 1)


def visible_keys(num_queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last `num_queries` tokens of a sequence sees: boolean [T, length]."""
    keys = torch.arange(length, device=device)
    positions = keys[length - num_queries :, None]
    visible = keys <= positions
    return visible if window is None else visible & (keys >= positions - window)
