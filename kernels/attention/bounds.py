"""What may attend to what, as intervals: query t of a row sees the keys low[t] <= s < high[t].

Causal masks, windows, packed documents, padding and caches all have this form, alone and together, and in all of them
low and high never fall from one query to the next. So the queries that see a key are an interval as well, first[s] <=
t < last[s], and the kernels need to know nothing else: what lies outside an interval is skipped, tile by tile.

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
    """The intervals of a mask. `lower`: whether any query has a first visible key other than 0."""

    low_BT: Tensor
    high_BT: Tensor
    first_BS: Tensor
    last_BS: Tensor
    lower: bool

    def visible_BTS(self) -> Tensor:
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
) -> Bounds:
    """Intervals of queries whose places among the keys are `positions_BT` (int64, ascending in a row).

    `start_BT` and `end_BT` bound the keys of each query's document or row (default 0 and S).
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
    first_BS = torch.searchsorted(high_BT.contiguous(), keys_BS, right=True)
    last_BS = torch.maximum(torch.searchsorted(low_BT.contiguous(), keys_BS, right=True), first_BS)
    lower = start_BT is not None or left is not None
    return Bounds(*(x.to(torch.int32) for x in (low_BT, high_BT, first_BS, last_BS)), lower)


def segment_bounds(segment_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each token begins and ends (exclusive): int64 [B, T]. Ids must not fall within a row."""
    ids_BT = segment_ids_BT.contiguous()
    return torch.searchsorted(ids_BT, ids_BT), torch.searchsorted(ids_BT, ids_BT, right=True)
