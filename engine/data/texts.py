"""Texts, or pairs of texts, with a label each: a class, or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trine.engine.data.encoder_batch import EncoderBatch, pad, padding_segments
from trine.engine.data.examples import Example, Record
from trine.engine.data.labels import Labels
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """One or two fields of text, framed as the tokenizer frames them, and a label: one of `labels`, or any number.

    A batch is as long as its longest text. `truncate`: cut what is longer than `seq_len`, else refuse it.
    """

    tokenizer: Tokenizer
    seq_len: int
    pad_id: int
    text_field: str
    pair_field: str | None
    label_field: str
    labels: Labels | None  # None: numbers
    truncate: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return "int32", "int8", "int32" if self.labels is not None else "float32"

    @property
    def identity(self) -> str:
        names = None if self.labels is None else self.labels.names
        return f"texts {self.seq_len} {self.pair_field is not None} {names} {self.truncate}"

    def encode(self, records: Sequence[Record]) -> list[Example]:
        texts = [record.text(self.text_field) for record in records]
        inputs: list[str | tuple[str, str]] = list(texts)
        if self.pair_field is not None:
            inputs = [(text, record.text(self.pair_field)) for text, record in zip(texts, records, strict=True)]
        encoded = self.tokenizer.encode_inputs(inputs, max_tokens=self.seq_len if self.truncate else None)
        examples: list[Example] = []
        for record, (ids, types) in zip(records, encoded, strict=True):
            if len(ids) > self.seq_len:
                raise DataError(
                    f"{record.place}: the text has {len(ids)} tokens, data.seq_len leaves room for {self.seq_len}; "
                    "raise data.seq_len (as far as the model's positions go), take the line out, or cut long texts by "
                    "data.truncate = true"
                )
            examples.append((np.array(ids), np.array(types), np.array([self._label(record)])))
        return examples

    def tokens(self, example: Example) -> int:
        return len(example[0])

    def terms(self, example: Example) -> int:
        return 1

    def shown(self, example: Example) -> str:
        return self.tokenizer.decode(example[0].tolist(), skip_special_tokens=False)

    def make(self, examples: Sequence[Example]) -> EncoderBatch:
        ids, types, labels = zip(*examples, strict=True)
        lengths = [len(row) for row in ids]
        length = max(lengths)
        return EncoderBatch(
            ids_BT=torch.from_numpy(pad(ids, length=length, value=self.pad_id)),
            segment_ids_BT=padding_segments(lengths, length=length),
            token_types_BT=torch.from_numpy(pad(types, length=length, value=0)) if any(map(np.any, types)) else None,
            labels_B=torch.from_numpy(np.concatenate(labels).astype("float32" if self.labels is None else "int64")),
            lengths_B=torch.tensor(lengths),
            counts=(len(examples),),
            num_tokens=sum(lengths),
        )

    def _label(self, record: Record) -> float | int:
        value: Any = record.field(self.label_field)
        if self.labels is not None:
            return self.labels.number(value, record.place)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{record.place}: field {self.label_field!r} should be a finite number, not {value!r}")
        return float(value)
