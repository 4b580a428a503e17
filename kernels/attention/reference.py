"""Scaled dot-product attention in plain torch: the formula, with nothing clever.

    o = softmax(scale * q k^T + mask) v          softmax in fp32 (fp64 for fp64 inputs)

Query head h reads key/value head h // (H / K) (grouped-query attention). The mask forms are those of `op.py`, and this
file is their definition: the CPU path and every kernel are tested against it in float64.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head dimension.
Source: Vaswani et al. 2017 (arXiv 1706.03762), Ainslie et al. 2023 (GQA, arXiv 2305.13245).
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    query_positions_BT: Tensor | None = None,
    segment_ids_BT: Tensor | None = None,
) -> Tensor:
    """As `trine.kernels.attention.op.attention` without dropout; returns o_BHTD in the dtype of q."""
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1], k_BKSD.shape[2]
    work = torch.promote_types(q_BHTD.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale
    k_BHSD = k_BKSD.repeat_interleave(H // K, dim=1).to(work)
    v_BHSD = v_BKSD.repeat_interleave(H // K, dim=1).to(work)
    scores_BHTS = scale * (q_BHTD.to(work) @ k_BHSD.transpose(-1, -2))
    allowed_BTS = torch.ones(B, T, S, dtype=torch.bool, device=q_BHTD.device)
    if causal:
        key_positions_S = torch.arange(S, device=q_BHTD.device)
        if query_positions_BT is None:
            query_positions_BT = torch.arange(T, device=q_BHTD.device).expand(B, T)
        allowed_BTS &= key_positions_S[None, None, :] <= query_positions_BT[:, :, None]
    if segment_ids_BT is not None:
        allowed_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    scores_BHTS = scores_BHTS.masked_fill(~allowed_BTS[:, None], float("-inf"))
    return (scores_BHTS.softmax(dim=-1) @ v_BHSD).to(q_BHTD.dtype)
