"""Masked language modelling: which tokens of a row are hidden, and rows for it from windows of prepared text.

Each token that is text (no special token) is chosen with probability `fraction`; with `whole_words` each word, with all
its tokens. Of the chosen ones a share of `mask_share` become the mask token, `random_share` a random token of the
vocabulary, and the rest stay as they are; the loss is taken at the chosen ones alone. The draws belong to the sample,
so every epoch hides others (Liu et al., RoBERTa, arXiv 1907.11692), and every evaluation the same.

Sources: Devlin et al., BERT (arXiv 1810.04805): 15 %, and 80 %, 10 %, 10 % of it. Warner et al., ModernBERT (arXiv
2412.13663): 30 %.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trine.engine.data.draws import integers, uniform
from trine.engine.data.encoder_batch import EncoderBatch, pad
from trine.engine.data.permutation import IntArray
from trine.engine.data.rows import Drawn
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """How much is hidden, and by what."""

    fraction: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False


class Masker:
    """Hides tokens of rows, as the module says. Raises `DataError` where the tokenizer has no mask token."""

    def __init__(self, tokenizer: Tokenizer, masking: Masking) -> None:
        if tokenizer.mask_id is None:
            raise DataError(
                "the data's tokenizer names no mask_token, which masked language modelling hides tokens by; train one "
                "with `trine tokenizer train --kind wordpiece` or `--roles encoder`, and prepare the data with it"
            )
        self.masking = masking
        self._mask_id = tokenizer.mask_id
        self._vocab_size = tokenizer.vocab_size
        self._special_V = np.zeros(tokenizer.vocab_size, dtype=bool)
        named = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        self._special_V[[*tokenizer.special_ids, *(one for one in named if one is not None)]] = True
        self._words = WordBorders(tokenizer) if masking.whole_words else None

    @property
    def identity(self) -> str:
        return f"{self.masking} {self._mask_id}"

    def hide(self, ids_T: IntArray, *, key: int) -> tuple[IntArray, IntArray]:
        """The row with tokens hidden [T], and the places of those that were chosen [M], ascending."""
        masking, count = self.masking, len(ids_T)
        unit_T = np.arange(count) if self._words is None else self._words.number(ids_T)
        chosen_T = uniform(key, count, purpose="choose")[unit_T] < masking.fraction
        chosen_T &= ~self._special_V[ids_T]
        fate_T = uniform(key, count, purpose="fate")
        hidden_T = chosen_T & (fate_T < masking.mask_share)
        random_T = chosen_T & ~hidden_T & (fate_T < masking.mask_share + masking.random_share)
        shown_T = np.where(hidden_T, self._mask_id, ids_T)
        shown_T = np.where(random_T, integers(key, count, self._vocab_size, purpose="random"), shown_T)
        return shown_T, np.flatnonzero(chosen_T)


class WordBorders:
    """Which tokens go on with the word of the token before them.

    In WordPiece these are the ones that begin with "##". Elsewhere a word is a run of letters, marks and digits: a
    token goes on with it where it begins with such a character and the token before it ends with one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._begins_V = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._ends_V = np.ones(tokenizer.vocab_size, dtype=bool)
        by_bytes = tokenizer.token_bytes
        for name, token in tokenizer.vocabulary.items():
            if by_bytes is None:
                self._begins_V[token] = name.startswith("##")
                continue
            # A part of a character that takes several bytes counts as a letter, which it nearly always is.
            text = by_bytes[token].decode("utf-8", errors="replace").replace("\ufffd", "a")
            self._begins_V[token] = bool(text) and _in_word(text[0])
            self._ends_V[token] = bool(text) and _in_word(text[-1])
        special = list(tokenizer.special_ids)
        self._begins_V[special] = self._ends_V[special] = False

    def number(self, ids_T: IntArray) -> IntArray:
        """The number of the word each token belongs to, from 0 [T]."""
        begins_T = np.ones(len(ids_T), dtype=bool)
        begins_T[1:] = ~(self._begins_V[ids_T[1:]] & self._ends_V[ids_T[:-1]])
        return np.cumsum(begins_T) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedRows:
    """Rows of `seq_len` tokens for masked language modelling.

    Where the tokenizer has a token for it ([CLS]), a row begins with it; with `document_mask` each document in a row
    does, and what does not fit any more at the row's end is left out, some other tokens in each epoch.
    """

    seq_len: int
    document_mask: bool
    masker: Masker
    first_id: int | None
    pad_id: int

    @property
    def window_len(self) -> int:
        return self.seq_len - (self.first_id is not None)

    @property
    def lookahead(self) -> int:
        return 0

    @property
    def identity(self) -> str:
        return f"masked-1 {self.document_mask} {self.first_id} {self.masker.identity}"

    def make(self, drawn: Sequence[Drawn]) -> EncoderBatch:
        rows, segments, positions, places, targets = [], [], [], [], []
        for row, one in enumerate(drawn):
            ids_T, segment_T, position_T = self._row(one)
            shown_T, chosen = self.masker.hide(ids_T, key=one.key)
            rows.append(shown_T)
            segments.append(segment_T)
            positions.append(position_T)
            places.append(row * self.seq_len + chosen)
            targets.append(ids_T[chosen])
        lengths = [len(row) for row in rows]
        apart = self.document_mask or min(lengths) < self.seq_len
        return EncoderBatch(
            ids_BT=torch.from_numpy(pad(rows, length=self.seq_len, value=self.pad_id)),
            # The padding gets a number that no document has.
            segment_ids_BT=torch.from_numpy(pad(segments, length=self.seq_len, value=self.seq_len)) if apart else None,
            positions_BT=torch.from_numpy(pad(positions, length=self.seq_len, value=0)) if apart else None,
            places_M=torch.from_numpy(np.concatenate(places)),
            targets_M=torch.from_numpy(np.concatenate(targets)),
            counts=(sum(len(chosen) for chosen in places),),
            num_tokens=sum(lengths),
        )

    def _row(self, one: Drawn) -> tuple[IntArray, IntArray, IntArray]:
        """Ids, document numbers and positions of one row, each [n] with n <= seq_len."""
        tokens, begins = one.window.tokens, [0]
        if self.document_mask:
            begins += [start for start in one.window.starts.tolist() if start > 0]
        first = [] if self.first_id is None else [self.first_id]
        pieces = [np.array([*first, *piece], dtype=np.int64) for piece in np.split(tokens, begins[1:])]
        numbers = [np.full(len(piece), number) for number, piece in enumerate(pieces)]
        places = [np.arange(len(piece)) for piece in pieces]
        ids_T, numbers_T, places_T = (np.concatenate(parts)[: self.seq_len] for parts in (pieces, numbers, places))
        return ids_T, numbers_T, places_T


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"
