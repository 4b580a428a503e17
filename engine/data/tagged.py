"""Words with a label each. A word may take several tokens: the first one is labelled, the others are not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trine.engine.data.batch import IGNORED
from trine.engine.data.encoder_batch import EncoderBatch, pad, padding_segments
from trine.engine.data.examples import Example, Record
from trine.engine.data.labels import Labels
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TagTask:
    """A field with a list of words and one with as many labels.

    `truncate`: leave out words that have no room in `seq_len` tokens, else refuse the line.
    """

    tokenizer: Tokenizer
    seq_len: int
    pad_id: int
    words_field: str
    labels_field: str
    labels: Labels
    truncate: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return "int32", "int32"

    @property
    def identity(self) -> str:
        return f"tags {self.seq_len} {self.labels.names} {self.truncate}"

    def encode(self, records: Sequence[Record]) -> list[Example]:
        texts = [record.words(self.words_field) for record in records]
        encoded = self.tokenizer.encode_words(texts)
        return [self._example(*parts) for parts in zip(records, texts, encoded, strict=True)]

    def tokens(self, example: Example) -> int:
        return len(example[0])

    def terms(self, example: Example) -> int:
        return int((example[1] != IGNORED).sum())

    def shown(self, example: Example) -> str:
        return self.tokenizer.decode(example[0].tolist(), skip_special_tokens=False)

    def make(self, examples: Sequence[Example]) -> EncoderBatch:
        ids, labels = zip(*examples, strict=True)
        lengths = [len(row) for row in ids]
        length = max(lengths)
        labels_BT = pad(labels, length=length, value=IGNORED)
        places_M = np.flatnonzero(labels_BT != IGNORED)
        return EncoderBatch(
            ids_BT=torch.from_numpy(pad(ids, length=length, value=self.pad_id)),
            segment_ids_BT=padding_segments(lengths, length=length),
            places_M=torch.from_numpy(places_M),
            targets_M=torch.from_numpy(labels_BT.ravel()[places_M]),
            counts=(len(places_M),),
            num_tokens=sum(lengths),
        )

    def _example(self, record: Record, words: list[str], encoded: tuple[list[int], list[int | None]]) -> Example:
        given = record.field(self.labels_field)
        if not isinstance(given, list) or len(given) != len(words):
            count = len(given) if isinstance(given, list) else "no list of"
            raise DataError(
                f"{record.place}: {len(words)} words in {self.words_field!r}, but {count} labels in "
                f"{self.labels_field!r}; give one for each word"
            )
        numbers = [self.labels.number(label, record.place) for label in given]
        ids, of_word = encoded
        targets = align(numbers, of_word)
        if lost := sorted(set(range(len(words))) - {word for word in of_word if word is not None}):
            raise DataError(
                f"{record.place}: the tokenizer has no token for the word {words[lost[0]]!r} (number {lost[0] + 1}), "
                "so that nothing bears its label; take both out"
            )
        if len(ids) > self.seq_len:
            ids, targets = self._cut(record, ids, of_word, targets)
        return np.array(ids), np.array(targets)

    def _cut(
        self, record: Record, ids: list[int], of_word: list[int | None], targets: list[int]
    ) -> tuple[list[int], list[int]]:
        if not self.truncate:
            raise DataError(
                f"{record.place}: the words are {len(ids)} tokens, data.seq_len leaves room for {self.seq_len}; raise "
                "data.seq_len (as far as the model's positions go), take the line out, or cut long texts by "
                "data.truncate = true"
            )
        # What frames the text at its end stays.
        tail = next((n for n, word in enumerate(reversed(of_word)) if word is not None), 0)
        kept = self.seq_len - tail
        behind = slice(len(ids) - tail, None)
        return ids[:kept] + ids[behind], targets[:kept] + targets[behind]


def align(labels: Sequence[int], of_word: Sequence[int | None]) -> list[int]:
    """The label of each token: that of its word where it is the word's first token, else -100."""
    before: int | None = None
    targets = []
    for word in of_word:
        targets.append(IGNORED if word is None or word == before else labels[word])
        before = word
    return targets
