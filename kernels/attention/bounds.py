"""What may attend to what, as intervals: query t of a row sees the keys low[t] <= s < high[t].

Causal masks, windows, packed documents, padding and caches all have this form, alone and together, and where queries
stand in ascending order low and high never fall from one query to the next. So the queries that see a key are an
interval as well, first[s] <= t < last[s], and the kernels need to know nothing else: what lies outside an interval is
skipped, tile by tile. Where the order is not known, first and last only enclose the queries that see a key.

Shapes: B rows (1 where all rows are alike), T queries, S keys. All tensors are int32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# (left, right): how many keys before and after a query's own place it may see; None is no limit.
Window = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The intervals of a mask.

    `lower`: whether any query has a first visible key other than 0. `ordered`: whether positions are known to ascend.
    """

    low_BT: Tensor
    high_BT: Tensor
    first_BS: Tensor
    last_BS: Tensor
    lower: bool
    ordered: bool

    def visible_BTS(self) -> Tensor:  # noqa: N802
        """The mask as booleans, True = attend: [B, T, S]."""
        keys_S = torch.arange(self.first_BS.shape[1], device=self.low_BT.device)
        return (keys_S >= self.low_BT[..., None]) & (keys_S < self.high_BT[..., None])


def make_bounds(
    positions_BT: Tensor,
    num_keys: int,
    *,
    causal: bool,
    window: Window = (None, None),
    start_BT: Tensor | None = None,
    end_BT: Tensor | None = None,
    ordered: bool = True,
) -> Bounds:
    """Intervals of queries whose places among the keys are `positions_BT` (int64).

    `start_BT` and `end_BT` bound the keys of each query's document or row (default 0 and S). `ordered`: positions
    ascend in a row.
    """
    left, right = window
    right = 0 if causal else right
    low_BT = torch.zeros_like(positions_BT) if start_BT is None else start_BT
    high_BT = torch.full_like(positions_BT, num_keys) if end_BT is None else end_BT
    if left is not None:
        low_BT = torch.maximum(low_BT, positions_BT - left)
    if right is not None:
        high_BT = torch.minimum(high_BT, positions_BT + right + 1)
    low_BT = low_BT.clamp(0, num_keys)
    # A query without keys has high = low.
    high_BT = torch.maximum(high_BT.clamp(0, num_keys), low_BT)
    keys_BS = torch.arange(num_keys, device=positions_BT.device).expand(low_BT.shape[0], -1).contiguous()
    highest_BT, lowest_BT = high_BT, low_BT
    if not ordered:
        highest_BT = high_BT.cummax(dim=1).values if high_BT.numel() else high_BT
        lowest_BT = low_BT.flip(1).cummin(dim=1).values.flip(1) if low_BT.numel() else low_BT
    first_BS = torch.searchsorted(highest_BT.contiguous(), keys_BS, right=True)
    last_BS = torch.maximum(torch.searchsorted(lowest_BT.contiguous(), keys_BS, right=True), first_BS)
    lower = start_BT is not None or left is not None
    low, high, first, last = (x.to(torch.int32).contiguous() for x in (low_BT, high_BT, first_BS, last_BS))
    return Bounds(low, high, first, last, lower, ordered)


def document_bounds(segment_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each token begins and ends (exclusive): int64 [B, T].

    A document is a run of neighbouring tokens with one id: an id that returns after another begins a new document.
    """
    changes_BT = torch.zeros_like(segment_ids_BT, dtype=torch.int64)
    changes_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    runs_BT = changes_BT.cumsum(dim=1)
    return torch.searchsorted(runs_BT, runs_BT), torch.searchsorted(runs_BT, runs_BT, right=True)


def packed_bounds(
    num_queries: int, num_keys: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *, causal: bool, window: Window
) -> tuple[Bounds, Tensor]:
    """Intervals of sequences that lie end to end and the positions of queries; see `attention_packed`.

    What lies past the last sequence sees nothing.
    """
    ends_q = cu_seqlens_q.to(torch.int64)
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.to(torch.int64)
    # One more sequence, without keys, takes what is left.
    ends_q = torch.cat((ends_q, ends_q.new_full((1,), num_queries)))
    ends_k = torch.cat((ends_k, ends_k[-1:]))
    places_N = torch.arange(num_queries, device=cu_seqlens_q.device)
    sequence_N = torch.searchsorted(ends_q, places_N, right=True) - 1
    start_N, end_N = ends_k[sequence_N], ends_k[sequence_N + 1]
    # The last query of a sequence stands at its last key.
    position_N = places_N - ends_q[sequence_N + 1] + end_N
    bounds = make_bounds(
        position_N[None],
        num_keys,
        causal=causal,
        window=window,
        start_BT=start_N[None],
        end_BT=torch.maximum(end_N, start_N)[None],
    )
    return bounds, position_N[None]
