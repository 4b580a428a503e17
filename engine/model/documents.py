"""Which tokens of a batch belong together, and where each stands in its own text: from a padding mask or from ids.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_documents(mask_BT: Tensor) -> Tensor:
    """Segment ids [B, T] for rows of one text each, padded on either side: the padding is a document of its own.

    `mask_BT`: True or 1 at the tokens of the text. Raises ValueError where padding lies between them (on a CPU).
    """
    segment_ids_BT = mask_BT.to(torch.bool).to(torch.int64)
    if segment_ids_BT.device.type == "cpu":
        begins = (segment_ids_BT.diff(dim=1, prepend=torch.zeros_like(segment_ids_BT[:, :1])) == 1).sum(dim=1)
        if bool((begins > 1).any()):
            raise ValueError("mask_BT has padding between the tokens of a row; put it on one side")
    return segment_ids_BT


def document_positions(segment_ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
    """Position of each token in its document, a run of one id, from 0: int64 [B, T].

    With `counted_BT` (boolean) those tokens alone count, and the others stand at -1.
    """
    if counted_BT is None:
        counted_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    total_BT = counted_BT.cumsum(dim=1)
    begins_BT = torch.ones_like(counted_BT)
    begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    before_BT = torch.where(begins_BT, total_BT - counted_BT.to(torch.int64), 0).cummax(dim=1).values
    return torch.where(counted_BT, total_BT - before_BT - 1, -1)
