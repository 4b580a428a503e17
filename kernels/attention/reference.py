"""Scaled dot-product attention in plain torch: the formula, with nothing clever.

    score = scale * q k^T;  softcap: score <- cap * tanh(score / cap);  + bias;  hidden keys: -inf
    o = softmax(score) v                     softmax in fp32 (fp64 for fp64 inputs)

Query head h reads key/value head h // (H / K) (grouped-query attention). A learned sink is one more logit of the
softmax, whose value is zero. The bias depends on a distance: slope * (s - p(t)), where p(t) is t unless positions are
given (ALiBi), or entry s - t + T - 1 of a table (T5). A query that sees no key gets 0. A document is a run of
neighbouring tokens with one segment id.

This file is the definition: the CPU paths and every kernel are tested against it in float64.
Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head dimension, R = T + S - 1 distances.
Source: Vaswani et al. 2017 (arXiv 1706.03762); Ainslie et al. 2023 (GQA, 2305.13245); Press et al. 2022 (ALiBi,
2108.12409); Raffel et al. 2020 (T5, 1910.10683); Gemma 2 (softcap, 2408.00118); gpt-oss 2025 (sinks, 2508.10925).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    B, _, T, _ = q_BHTD.shape
    S = k_BKSD.shape[2]
    allowed_BTS = torch.ones(B, T, S, dtype=torch.bool, device=q_BHTD.device)
    if causal:
        key_positions_S = torch.arange(S, device=q_BHTD.device)
        if query_positions_BT is None:
            query_positions_BT = torch.arange(T, device=q_BHTD.device).expand(B, T)
        allowed_BTS &= key_positions_S[None, None, :] <= query_positions_BT[:, :, None]
    if segment_ids_BT is not None:
        runs_BT = F.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], (1, 0)).cumsum(dim=1)
        allowed_BTS &= runs_BT[:, :, None] == runs_BT[:, None, :]
    return attend(q_BHTD, k_BKSD, v_BKSD, visible_BTS=allowed_BTS, scale=scale)[0]


def attend(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    visible_BTS: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None,
    position_BT: Tensor | None = None,
    relative_bias_HR: Tensor | None = None,
    dropout_p: float = 0.0,
    keep_BHTS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o_BHTD in the dtype of q, natural log-sum-exp of the scores [B, H, T] in fp32 or fp64).

    `visible_BTS`: boolean, True = attend, [B or 1, T, S]. `position_BT`: p(t), [B or 1, T].
    `keep_BHTS`: which weights dropout keeps, for tests.
    """
    _, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1], k_BKSD.shape[2]
    work = torch.promote_types(q_BHTD.dtype, torch.float32)
    k_BHSD = k_BKSD.repeat_interleave(H // K, dim=1).to(work)
    v_BHSD = v_BKSD.repeat_interleave(H // K, dim=1).to(work)
    scores_BHTS = (D**-0.5 if scale is None else scale) * (q_BHTD.to(work) @ k_BHSD.transpose(-1, -2))
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    distance_TS = torch.arange(S, device=q_BHTD.device) - torch.arange(T, device=q_BHTD.device)[:, None]
    if alibi_slopes_H is not None:
        keys_S = torch.arange(S, device=q_BHTD.device)
        distance_BTS = distance_TS[None] if position_BT is None else keys_S - position_BT[..., None]
        scores_BHTS = scores_BHTS + alibi_slopes_H.to(work)[:, None, None] * distance_BTS[:, None]
    if relative_bias_HR is not None:
        scores_BHTS = scores_BHTS + relative_bias_HR.to(work)[:, distance_TS + T - 1]
    if visible_BTS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~visible_BTS[:, None], float("-inf"))
    if sinks_H is not None:
        sink_BHT1 = sinks_H.to(work)[:, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat((sink_BHT1, scores_BHTS), dim=-1)
    lse_BHT = torch.logsumexp(scores_BHTS, dim=-1)
    # Where nothing is visible, subtracting 0 instead of -inf gives weights of 0.
    weights_BHTS = torch.exp(scores_BHTS - lse_BHT.masked_fill(lse_BHT == float("-inf"), 0.0)[..., None])
    if sinks_H is not None:
        weights_BHTS = weights_BHTS[..., 1:]
    if keep_BHTS is not None:
        weights_BHTS = torch.where(keep_BHTS, weights_BHTS / (1.0 - dropout_p), 0.0)
    elif dropout_p:
        weights_BHTS = F.dropout(weights_BHTS, dropout_p)
    return (weights_BHTS @ v_BHSD).to(q_BHTD.dtype), lse_BHT
