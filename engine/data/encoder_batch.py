"""What an encoder is fed, and what it is to say of it.

Shapes: B rows, T tokens in a row, M tokens whose prediction counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trine.engine.data.batch import moved
from trine.engine.data.permutation import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderBatch:
    """Rows of tokens, some of which have targets, or which have a label each.

    ids_BT: int64. segment_ids_BT: int64, documents and the padding apart; None where a row is one document.
    positions_BT: int64, inside the document; None where it is 0 .. T - 1.
    token_types_BT: int64, 1 for the second text of a pair; None where there are none.
    places_M, targets_M: int64, places in the flattened rows and what stands there in truth; None without targets.
    labels_B: int64 classes, or float32 numbers; None without labels. lengths_B: int64, tokens of each row that has one.
    counts: of each sum that the objective makes, how many terms this batch has.
    num_tokens: tokens that are not padding.
    """

    ids_BT: Tensor
    segment_ids_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    token_types_BT: Tensor | None = None
    places_M: Tensor | None = None
    targets_M: Tensor | None = None
    labels_B: Tensor | None = None
    lengths_B: Tensor | None = None
    counts: tuple[int, ...]
    num_tokens: int

    def to(self, device: torch.device | str) -> EncoderBatch:
        """The same batch on another device."""
        return moved(self, device)


def pad(rows: Sequence[IntArray], *, length: int, value: int) -> IntArray:
    """Rows [n] of at most `length` numbers as [B, length], `value` behind them."""
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for row, numbers in zip(padded, rows, strict=True):
        row[: len(numbers)] = numbers
    return padded


def padding_segments(lengths: Sequence[int], *, length: int) -> Tensor | None:
    """Segment ids [B, length] that keep the padding behind `lengths` tokens apart; None where there is no padding."""
    if min(lengths) == length:
        return None
    return torch.from_numpy((np.arange(length) >= np.asarray(lengths)[:, None]).astype(np.int64))
