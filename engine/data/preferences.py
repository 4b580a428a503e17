"""Pairs of answers to one prompt as examples: the one that is preferred, and the other.

An example is the two conversations, each as ids and which of them are its answer; a batch lays both of each pair into
rows as `chats.py` does.

Shapes: B rows, T tokens in a row, M tokens of answers in all, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED, moved, up_to_last
from trine.engine.data.chats import ChatLayout, Rendered
from trine.engine.data.conversations import preference_of
from trine.engine.data.examples import Example, Record
from trine.engine.data.packing import laid_out


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """Rows of conversations; all tensors int64.

    places_M: where, among all tokens of the batch in order, stands what an answer's token is predicted from; targets_M:
    that token; answers_M: which answer it belongs to, 2 p for the preferred one of pair p and 2 p + 1 for the other.
    counts: pairs. num_tokens: tokens that are not padding. Segments and positions as in `Batch`.
    """

    ids_BT: Tensor
    segment_ids_BT: Tensor | None
    positions_BT: Tensor | None
    places_M: Tensor
    targets_M: Tensor
    answers_M: Tensor
    counts: tuple[int, ...]
    num_tokens: int

    @property
    def real_tokens(self) -> Tensor | None:
        """As in `Batch`."""
        if self.num_tokens == self.ids_BT.numel():
            return None
        marked_N = torch.zeros(self.ids_BT.numel(), dtype=torch.bool, device=self.ids_BT.device)
        return up_to_last(marked_N.index_fill(0, self.places_M, True).view_as(self.ids_BT))

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on another device."""
        return moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceTask:
    """Pairs of answers (see `conversations.py`). `reference`: marks of the model that rewards are measured from."""

    layout: ChatLayout
    reference: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        return "int32", "bool", "int32", "bool"

    @property
    def identity(self) -> str:
        return f"preferences {self.layout.identity} {self.reference}"

    def encode(self, records: Sequence[Record]) -> list[Example | None]:
        rendered = [one for record in records for one in self._rendered(record)]
        encoded = self.layout.encode([record for record in records for _ in range(2)], rendered)
        pairs = zip(encoded[::2], encoded[1::2], strict=True)
        return [(*one, *other) if one[1].any() and other[1].any() else None for one, other in pairs]

    def tokens(self, example: Example) -> int:
        return len(example[0]) + len(example[2]) - 2

    def terms(self, example: Example) -> int:
        return 1

    def shown(self, example: Example) -> str:
        chosen, rejected = self.layout.shown(*example[:2]), self.layout.shown(*example[2:])
        return f"{chosen.strip()}\nrejected:\n{rejected}"

    def make(self, examples: Sequence[Example]) -> PreferenceBatch:
        both = [part for one in examples for part in (one[:2], one[2:])]
        batch = self.layout.batch([(ids, trained) for ids, trained in both])
        inside = [np.full(len(ids) - 1, number, dtype=np.int64) for number, (ids, _) in enumerate(both)]
        answers_BT = laid_out(inside, self.layout.rows([len(one) for one in inside]), filler=-1)[0]
        targets_N = batch.targets_BT.flatten()
        [places_M] = torch.nonzero(targets_N != IGNORED, as_tuple=True)
        return PreferenceBatch(
            ids_BT=batch.ids_BT,
            segment_ids_BT=batch.segment_ids_BT,
            positions_BT=batch.positions_BT,
            places_M=places_M,
            targets_M=targets_N[places_M],
            answers_M=answers_BT.flatten()[places_M],
            counts=(len(examples),),
            num_tokens=batch.num_tokens,
        )

    def _rendered(self, record: Record) -> list[Rendered]:
        """Both conversations."""
        asked, chosen, rejected = preference_of(record)
        return [self.layout.render(record, [*asked, *answer], first=len(asked)) for answer in (chosen, rejected)]
