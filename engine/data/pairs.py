"""Sequence-to-sequence examples: a source text and the target text that it should become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trine.engine.data.examples import Example, Record
from trine.engine.data.permutation import IntArray
from trine.engine.data.seq2seq_batch import Seq2SeqBatch, Seq2SeqLayout
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTask:
    """Two fields of text; both are tokens that end with end-of-text. `truncate`: cut what is too long, else refuse."""

    tokenizer: Tokenizer
    layout: Seq2SeqLayout
    source_field: str
    target_field: str
    eos_id: int
    truncate: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return "int32", "int32"

    @property
    def identity(self) -> str:
        layout = self.layout
        return f"pairs {self.eos_id} {layout.source_len} {layout.target_len} {self.truncate}"

    def encode(self, records: Sequence[Record]) -> list[Example]:
        sources = self._side(records, self.source_field, self.layout.source_len, "data.seq_len")
        targets = self._side(records, self.target_field, self.layout.target_len, "data.target_len")
        return list(zip(sources, targets, strict=True))

    def tokens(self, example: Example) -> int:
        return sum(map(len, example))

    def terms(self, example: Example) -> int:
        return len(example[1])

    def shown(self, example: Example) -> str:
        return " → ".join(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in example)

    def make(self, examples: Sequence[Example]) -> Seq2SeqBatch:
        sources, targets = zip(*examples, strict=True)
        return self.layout.batch(sources, targets)

    def _side(self, records: Sequence[Record], field: str, room: int, setting: str) -> list[IntArray]:
        texts = [record.text(field) for record in records]
        rows = self.tokenizer.encode_batch(texts, parse_special=False)
        return [
            np.append(fitting(ids, room - 1, record, field, setting, truncate=self.truncate), self.eos_id)
            for record, ids in zip(records, rows, strict=True)
        ]


def fitting(
    ids: Sequence[int], room: int, record: Record, field: str, setting: str, *, truncate: bool
) -> Sequence[int]:
    """The ids, cut to `room` with `truncate`. Raises `DataError` where they are more and must not be cut."""
    if len(ids) <= room:
        return ids
    if truncate:
        return ids[:room]
    raise DataError(
        f"{record.place}: field {field!r} has {len(ids)} tokens, {setting} leaves room for {room}; raise {setting} (as "
        "far as the model's positions go), take the line out, or cut long texts by data.truncate = true"
    )
