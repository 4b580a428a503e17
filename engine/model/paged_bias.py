"""Attention with relative positions over a paged cache: each new token against the blocks of its own sequence.

Plain torch, for encoder-decoders alone, whose targets are short: keys and values of a step's sequences are gathered
once a layer, in the number of slots of the longest. The softmax runs in float32.

Shapes: N new tokens of R sequences, S slots, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.model.positions import Biases


def biased_paged_attention(
    q_NHD: Tensor,
    k_PSKD: Tensor,
    v_PSKD: Tensor,
    *,
    k_scale_PSK: Tensor | None,
    v_scale_PSK: Tensor | None,
    block_table_RM: Tensor,
    query_starts: Tensor,
    positions_N: Tensor,
    num_slots: int,
    biases: Biases,
    scale: float | None,
) -> Tensor:
    """o_NHD in the dtype of q. A token sees what stands at its own position and before it.

    `query_starts` [R + 1]: where each sequence's tokens begin. `num_slots`: no position lies beyond.
    """
    block_size, N = k_PSKD.shape[1], len(q_NHD)
    num_slots = min(num_slots, block_table_RM.shape[1] * block_size)
    slots_S = torch.arange(num_slots, device=q_NHD.device)
    slots_RS = block_table_RM.long()[:, slots_S // block_size] * block_size + slots_S % block_size
    k_NSKD, v_NSKD = (
        _gathered(pool, scales, slots_RS) for pool, scales in ((k_PSKD, k_scale_PSK), (v_PSKD, v_scale_PSK))
    )
    if len(block_table_RM) < N:  # some sequence has several tokens
        counts_R = query_starts.diff().long()
        rows_N = torch.repeat_interleave(torch.arange(len(counts_R), device=counts_R.device), counts_R)
        k_NSKD, v_NSKD = k_NSKD[rows_N], v_NSKD[rows_N]
    q_NKGD = q_NHD.float().reshape(N, k_NSKD.shape[2], -1, q_NHD.shape[2])
    scores_NKGS = torch.einsum("nkgd,nskd->nkgs", q_NKGD, k_NSKD)
    scores_NHS = scores_NKGS.flatten(1, 2) * (q_NHD.shape[-1] ** -0.5 if scale is None else scale)
    scores_NHS = scores_NHS + biases.scattered(positions_N, num_slots)
    scores_NHS = scores_NHS.masked_fill((slots_S > positions_N[:, None])[:, None], float("-inf"))
    weights_NKGS = scores_NHS.softmax(-1).view_as(scores_NKGS)
    return torch.einsum("nkgs,nskd->nkgd", weights_NKGS, v_NSKD).flatten(1, 2).to(q_NHD.dtype)


def _gathered(pool_PSKD: Tensor, scale_PSK: Tensor | None, slots_RS: Tensor) -> Tensor:
    """What lies in these slots, as float32 [R, S, K, D]."""
    x_RSKD = pool_PSKD.flatten(0, 1)[slots_RS].float()
    return x_RSKD if scale_PSK is None else x_RSKD * scale_PSK.flatten(0, 1)[slots_RS][..., None]
