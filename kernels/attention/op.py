"""Attention: the public operation.

    o = softmax(scale * q k^T + mask) v

What may attend to what is said by meaning, never by a dense bias, so that a kernel can skip what is masked:

| causal | query_positions_BT | segment_ids_BT | query t of row b sees key s when | used for |
|---|---|---|---|---|
| yes | - | - | s <= t (needs T == S) | training, first prefill |
| yes | - | given | s <= t and segment s == segment t (T == S) | training on packed documents |
| yes | given | - | s <= query_positions[b, t] | decoding and chunked prefill with a cache |
| no | - | - or given | always, or inside a segment (T == S) | encoders; one new token against an exact cache |

Anything else is refused. A `Mask` is made once per forward pass and shared by all layers.
Cost: 4 B H T S D FLOPs forward (causal kernels skip half), 2.5 times that backward.

Paths: causal training in bf16 on the CPU runs `blocked.py`; all else torch's scaled_dot_product_attention (flash
attention on CPU and CUDA where its conditions hold).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.attention.blocked import blocked_attention


@dataclass(frozen=True, slots=True)
class Mask:
    """What may be attended to. Build it with `make_mask`.

    `dense_B1TS`: boolean, True = attend; None where `causal` alone says it. `first_key_BT`: with causal segments that
    are runs of tokens, where each token's segment begins.
    """

    causal: bool
    dense_B1TS: Tensor | None = None
    first_key_BT: Tensor | None = None


def make_mask(
    *,
    causal: bool,
    num_keys: int,
    query_positions_BT: Tensor | None = None,
    segment_ids_BT: Tensor | None = None,
) -> Mask:
    """Prepare a mask for `attention`; see the table above. Raises ValueError for a combination outside it."""
    if query_positions_BT is not None and (segment_ids_BT is not None or not causal):
        raise ValueError("query_positions_BT (a cache) needs causal=True and no segment_ids_BT")
    if query_positions_BT is not None:
        keys_S = torch.arange(num_keys, device=query_positions_BT.device)
        return Mask(causal=True, dense_B1TS=(keys_S <= query_positions_BT[..., None])[:, None])
    if segment_ids_BT is None:
        return Mask(causal=causal)
    if segment_ids_BT.shape[1] != num_keys:
        raise ValueError(f"segment ids of length {segment_ids_BT.shape[1]} for {num_keys} keys; they must agree")
    if bool((segment_ids_BT == segment_ids_BT[:, :1]).all()):
        return Mask(causal=causal)  # one segment a row: nothing to hide
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if not causal:
        return Mask(causal=False, dense_B1TS=same_BTS[:, None])
    return Mask(causal=True, dense_B1TS=same_BTS.tril()[:, None], first_key_BT=_segment_starts(segment_ids_BT))


def _segment_starts(segment_ids_BT: Tensor) -> Tensor | None:
    """Where the segment of each token begins; None unless ids ascend, for then an id might return after a gap."""
    steps_BT = segment_ids_BT[:, 1:] - segment_ids_BT[:, :-1]
    if bool((steps_BT < 0).any()):
        return None
    places_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    starts_BT = torch.zeros_like(segment_ids_BT)
    starts_BT[:, 1:] = torch.where(steps_BT > 0, places_T[1:], 0)
    return starts_BT.cummax(dim=1).values


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of H query heads over K key/value heads (H a multiple of K); returns o_BHTD in the dtype of q.

    `scale` defaults to D**-0.5. `dropout_p` drops attention weights (training only; the caller passes 0 otherwise).
    Raises ValueError for mixed dtypes, head counts that do not divide, and a causal mask with T != S.
    """
    _check(q_BHTD, k_BKSD, v_BKSD, mask)
    blocks_fit = mask.causal and (mask.dense_B1TS is None or mask.first_key_BT is not None)
    if blocks_fit and _trains_on_cpu(q_BHTD) and not dropout_p:
        scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
        return blocked_attention(q_BHTD, k_BKSD, v_BKSD, scale=scale, first_key_BT=mask.first_key_BT)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        attn_mask=mask.dense_B1TS,
        dropout_p=dropout_p,
        is_causal=mask.causal and mask.dense_B1TS is None,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
    )


def _trains_on_cpu(q_BHTD: Tensor) -> bool:
    half = q_BHTD.dtype in (torch.bfloat16, torch.float16)
    return q_BHTD.device.type == "cpu" and half and q_BHTD.requires_grad and torch.is_grad_enabled()


def _check(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> None:
    if not q_BHTD.dtype == k_BKSD.dtype == v_BKSD.dtype:
        raise ValueError(f"q, k, v have dtypes {q_BHTD.dtype}, {k_BKSD.dtype}, {v_BKSD.dtype}; cast them to one")
    H, K = q_BHTD.shape[1], k_BKSD.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads do not divide into groups over {K} key/value heads")
    if mask.causal and mask.dense_B1TS is None and q_BHTD.shape[2] != k_BKSD.shape[2]:
        raise ValueError(
            f"a causal mask without positions needs as many queries as keys, not {q_BHTD.shape[2]} and "
            f"{k_BKSD.shape[2]}; give query_positions_BT to make_mask"
        )
