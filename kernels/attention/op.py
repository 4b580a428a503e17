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

Here the work is done by torch's scaled_dot_product_attention (flash attention on CPU and CUDA where its conditions
hold); packed documents run as one causal call per document when they are few, since that skips all masked work.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mask:
    """What may be attended to, prepared for the torch path. Build it with `make_mask`.

    `dense_B1TS`: boolean, True = attend; None where `causal` alone says it. `spans`: (row, start, stop) of each packed
    document, when running them one by one is cheaper than a dense mask.
    """

    causal: bool
    dense_B1TS: Tensor | None = None
    spans: tuple[tuple[int, int, int], ...] | None = None


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
        return Mask(causal=False, dense_B1TS=(keys_S <= query_positions_BT[..., None])[:, None])
    if segment_ids_BT is None:
        return Mask(causal=causal)
    if segment_ids_BT.shape[1] != num_keys:
        raise ValueError(f"segment ids of length {segment_ids_BT.shape[1]} for {num_keys} keys; they must agree")
    spans = _document_spans(segment_ids_BT) if causal and segment_ids_BT.device.type == "cpu" else None
    if spans is not None:
        return Mask(causal=True, spans=spans)
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if causal:
        same_BTS = same_BTS.tril()
    return Mask(causal=False, dense_B1TS=same_BTS[:, None])


# Below this mean document length the calls cost more than the masked work they skip.
_SHORTEST_MEAN_SPAN = 48


def _document_spans(segment_ids_BT: Tensor) -> tuple[tuple[int, int, int], ...] | None:
    """Runs of equal ids, if ids never return after a gap (then runs are segments) and runs are long enough."""
    B, T = segment_ids_BT.shape
    changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    if (int(changes_BT.sum()) + B) * _SHORTEST_MEAN_SPAN > B * T:
        return None
    if bool((segment_ids_BT[:, 1:] < segment_ids_BT[:, :-1]).any()):
        return None  # not in ascending order: an id might come back later in the row
    spans = []
    for row in range(B):
        borders = [0, *(changes_BT[row].nonzero().flatten() + 1).tolist(), T]
        spans += [(row, start, stop) for start, stop in pairwise(borders)]
    return tuple(spans)


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
    if mask.spans is not None and len(mask.spans) > q_BHTD.shape[0]:
        return _by_document(q_BHTD, k_BKSD, v_BKSD, mask.spans, scale=scale, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        attn_mask=mask.dense_B1TS,
        dropout_p=dropout_p,
        is_causal=mask.causal,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
    )


def _by_document(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    spans: tuple[tuple[int, int, int], ...],
    *,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Causal attention inside each (row, start, stop). Spans lie in order and cover every position."""
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    parts_HTD = [
        F.scaled_dot_product_attention(
            q_BHTD[row : row + 1, :, start:stop],
            k_BKSD[row : row + 1, :, start:stop],
            v_BKSD[row : row + 1, :, start:stop],
            dropout_p=dropout_p,
            is_causal=True,
            scale=scale,
            enable_gqa=gqa,
        )[0].transpose(0, 1)
        for row, start, stop in spans
    ]
    B, H, T, D = q_BHTD.shape
    return torch.cat(parts_HTD).view(B, T, H, D).transpose(1, 2)


def _check(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> None:
    if not q_BHTD.dtype == k_BKSD.dtype == v_BKSD.dtype:
        raise ValueError(f"q, k, v have dtypes {q_BHTD.dtype}, {k_BKSD.dtype}, {v_BKSD.dtype}; cast them to one")
    H, K = q_BHTD.shape[1], k_BKSD.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads do not divide into groups over {K} key/value heads")
    if mask.causal and q_BHTD.shape[2] != k_BKSD.shape[2]:
        raise ValueError(
            f"a causal mask without positions needs as many queries as keys, not {q_BHTD.shape[2]} and "
            f"{k_BKSD.shape[2]}; give query_positions_BT to make_mask"
        )
