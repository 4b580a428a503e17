"""Next sentence prediction beside masked language modelling: rows of two texts, the second of which may not follow.

    [CLS] first [SEP] second [SEP]        label 0: the second goes on where the first ends; 1: another document's

A window is cut in two at a random place within the longest stretch of one document that it holds; for half of the rows
the second part is replaced by as long a stretch from another document, drawn at random. As in BERT, a "sentence" is any
stretch of text.

Source: Devlin et al., BERT (arXiv 1810.04805), section 3.1 and appendix A.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from trine.engine.data.draws import integers, uniform
from trine.engine.data.encoder_batch import EncoderBatch, pad, padding_segments
from trine.engine.data.masking import Masker
from trine.engine.data.permutation import IntArray
from trine.engine.data.rows import Drawn
from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError

FOLLOWS, RANDOM = 0, 1
_SPECIAL = 3  # tokens that frame the two texts


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """Rows of up to `seq_len` tokens, half of which have a second text that does not follow the first."""

    seq_len: int
    masker: Masker
    first_id: int
    sep_id: int
    pad_id: int

    @property
    def window_len(self) -> int:
        return self.seq_len - _SPECIAL

    @property
    def lookahead(self) -> int:
        return 0

    @property
    def identity(self) -> str:
        return f"pairs-1 {self.first_id} {self.sep_id} {self.masker.identity}"

    def make(self, drawn: Sequence[Drawn]) -> EncoderBatch:
        rows, types, places, targets, labels = [], [], [], [], []
        for row, one in enumerate(drawn):
            first, second, label = self._texts(one)
            ids_T = np.array([self.first_id, *first, self.sep_id, *second, self.sep_id], dtype=np.int64)
            shown_T, chosen = self.masker.hide(ids_T, key=one.key)
            rows.append(shown_T)
            types.append(np.repeat([0, 1], [len(first) + 2, len(second) + 1]))
            places.append(row * self.seq_len + chosen)
            targets.append(ids_T[chosen])
            labels.append(label)
        lengths = [len(row) for row in rows]
        return EncoderBatch(
            ids_BT=torch.from_numpy(pad(rows, length=self.seq_len, value=self.pad_id)),
            segment_ids_BT=padding_segments(lengths, length=self.seq_len),
            token_types_BT=torch.from_numpy(pad(types, length=self.seq_len, value=0)),
            places_M=torch.from_numpy(np.concatenate(places)),
            targets_M=torch.from_numpy(np.concatenate(targets)),
            labels_B=torch.tensor(labels),
            lengths_B=torch.tensor(lengths),
            counts=(sum(len(chosen) for chosen in places), len(labels)),
            num_tokens=sum(lengths),
        )

    def _texts(self, one: Drawn) -> tuple[IntArray, IntArray, int]:
        begin, end = _longest(one)
        text = one.window.tokens[begin:end]
        # At least one token for the first text; of a single one nothing is left to follow.
        cut = 1 + int(integers(one.key, 1, max(1, len(text) - 1), purpose="cut")[0])
        follows = len(text) > cut and uniform(one.key, 1, purpose="follows")[0] < 0.5
        if follows:
            return text[:cut], text[cut:], FOLLOWS
        here, _ = one.shards.document_at((one.start + begin) % one.shards.num_tokens)
        return text[:cut], _elsewhere(one.shards, here, max(1, len(text) - cut), one.key), RANDOM


def _longest(one: Drawn) -> tuple[int, int]:
    """Begin and end of the longest stretch of one document in a window, its end-of-text token left out."""
    length = len(one.window.tokens)
    borders = sorted({0, length, *one.window.starts.tolist()})
    stretches = [
        (begin, end - int(one.window.tokens[end - 1] == one.shards.eos_id)) for begin, end in pairwise(borders)
    ]
    return max(stretches, key=lambda stretch: stretch[1] - stretch[0])


def _elsewhere(shards: TokenShards, here: int, length: int, key: int) -> IntArray:
    """Up to `length` tokens of a random document that is not number `here`, from a random place in it."""
    others = shards.num_documents - 1
    if others < 1:
        raise DataError(
            f"{shards.folder} has {shards.num_documents} document in its {shards.split} split; to tell what follows "
            "from what does not, next_sentence needs two or more: give each text a file or line of its own"
        )
    drawn = 1 + int(integers(key, 1, others, purpose="document")[0])
    for step in range(others):  # past documents without any text
        begin, end = shards.document_bounds((here + 1 + (drawn - 1 + step) % others) % shards.num_documents)
        if end - 1 > begin:
            # As late as leaves room for all of it, where the document is long enough.
            latest = max(0, end - 1 - begin - length)
            start = begin + int(integers(key, 1, latest + 1, purpose="place")[0])
            return shards.read(start, min(length, end - 1 - start))
    raise DataError(f"{shards.folder}: no other document of its {shards.split} split has any text; give more text")
