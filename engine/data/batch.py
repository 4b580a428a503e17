"""What the model is fed: a batch of token windows, and how it is cut from a stream of documents.

Shapes: B rows, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

IGNORED = -100
BatchT = TypeVar("BatchT", bound="DataclassInstance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of tokens with the tokens that should follow them.

    ids_BT: int64. targets_BT: int64, the next token, or -100 where no loss is taken.
    segment_ids_BT: int64, number of the document inside the row, from 0; None where rows are not divided.
    positions_BT: int64, position inside the document's part of the row; None where it is just 0 .. T - 1.
    num_valid: how many targets are not -100.
    num_bytes: UTF-8 bytes of the text of those targets, where it is known (validation).
    padding: how many tokens only fill rows.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    segment_ids_BT: Tensor | None
    positions_BT: Tensor | None
    num_valid: int
    num_bytes: int | None = None
    padding: int = 0

    @property
    def counts(self) -> tuple[int]:
        """Terms of the one sum that a loss over next tokens is."""
        return (self.num_valid,)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding left out."""
        return self.ids_BT.numel() - self.padding

    @property
    def real_tokens(self) -> Tensor | None:
        """bool [B, T]: those that are not padding, which stands behind the last target of a row; None if all are."""
        return up_to_last(self.targets_BT != IGNORED) if self.padding else None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return moved(self, device)


def up_to_last(marked_BT: Tensor) -> Tensor:
    """bool [B, T]: the last place of a row that is marked, and all before it."""
    return marked_BT.flip(1).cumsum(1).flip(1) > 0


def moved(batch: BatchT, device: torch.device | str) -> BatchT:
    """A batch, any dataclass of tensors and numbers, with its tensors on another device."""
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)


@dataclass(frozen=True, slots=True)
class Window:
    """T + 1 successive tokens (fewer at the end of a validation split) and which of them begin a document."""

    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]  # ascending indices into tokens


def make_batch(
    windows: Sequence[Window],
    *,
    seq_len: int,
    document_mask: bool,
    token_lengths_V: npt.NDArray[np.int64] | None = None,
) -> Batch:
    """Windows as a batch [len(windows), seq_len].

    With `document_mask`, documents in a row get segment ids and positions of their own, and the first token of a
    document is nobody's target: nothing before it says what the next document will be.
    Short windows are filled with id 0 and target -100. `token_lengths_V`: bytes of each token, for `num_bytes`.
    """
    shape = (len(windows), seq_len)
    ids_BT = np.zeros(shape, dtype=np.int64)
    targets_BT = np.full(shape, IGNORED, dtype=np.int64)
    begins_BT = np.zeros(shape, dtype=bool)
    for row, window in enumerate(windows):
        length = len(window.tokens) - 1
        ids_BT[row, :length] = window.tokens[:-1]
        targets_BT[row, :length] = window.tokens[1:]
        if document_mask:
            targets_BT[row, window.starts[window.starts > 0] - 1] = IGNORED
            begins_BT[row, window.starts[(window.starts > 0) & (window.starts < seq_len)]] = True
    valid_BT = targets_BT != IGNORED
    segment_ids_BT = positions_BT = None
    if document_mask:
        segment_ids_BT = torch.from_numpy(begins_BT.cumsum(axis=1))
        places_BT = np.broadcast_to(np.arange(seq_len), shape)
        positions_BT = torch.from_numpy(places_BT - np.maximum.accumulate(np.where(begins_BT, places_BT, 0), axis=1))
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        targets_BT=torch.from_numpy(targets_BT),
        segment_ids_BT=segment_ids_BT,
        positions_BT=positions_BT,
        num_valid=int(valid_BT.sum()),
        num_bytes=None if token_lengths_V is None else int(token_lengths_V[targets_BT[valid_BT]].sum()),
    )
