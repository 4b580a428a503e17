"""Span corruption, T5's objective: stretches of the text are taken out, and the target says what they were.

    text     a b c d e f g h      hidden: b c and f
    source   a <X> d e <Y> g h    targets take the place of stretches that stay: <X> b c <Y> f

Of L tokens round(`density` L) are hidden, in round(that / `mean_span`) spans. Both the hidden and the other tokens are
cut into as many pieces at random, every way of cutting as likely; they take turns, beginning with one that stays. The
i-th span is marked by the i-th sentinel, <extra_id_0>, <extra_id_1>, ...: ids that are counted down from the end of the
vocabulary. Source and target end with end-of-text. Together they hold the whole text.

L is the largest for which a source has at most `source_len` tokens; all sources of a length L, and all targets, are
equally long, so nothing is padded but the end of a validation split.

Source: Raffel et al., T5 (arXiv 1910.10683), sections 3.1.4 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trine.engine.data.draws import choose
from trine.engine.data.masking import BoolArray
from trine.engine.data.permutation import IntArray
from trine.engine.data.rows import Drawn
from trine.engine.data.seq2seq_batch import Seq2SeqBatch, Seq2SeqLayout
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import SENTINEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How much is hidden, and in spans of which mean length."""

    density: float = 0.15
    mean_span: float = 3.0

    def counts(self, length: int) -> tuple[int, int]:
        """Hidden tokens and spans of a text of `length` >= 2 tokens: at least one of each, and one token stays."""
        hidden = min(max(round(length * self.density), 1), length - 1)
        spans = max(round(hidden / self.mean_span), 1)
        return hidden, min(spans, hidden, length - hidden)

    def lengths(self, length: int) -> tuple[int, int]:
        """Tokens of source and target for a text of `length`, end-of-text counted."""
        hidden, spans = self.counts(length)
        return length - hidden + spans + 1, hidden + spans + 1

    def text_len(self, source_len: int) -> int:
        """The longest text whose source has at most `source_len` tokens; 0 where there is none."""
        length = 2
        if self.lengths(length)[0] > source_len:
            return 0
        while self.lengths(length + 1)[0] <= source_len:
            length += 1
        return length

    def hide(self, length: int, *, key: int) -> BoolArray:
        """Which tokens of a text are hidden, [length]."""
        hidden, spans = self.counts(length)
        stays = _pieces(length - hidden, spans, key, "stays")
        gone = _pieces(hidden, spans, key, "gone")
        hidden_L: BoolArray = np.repeat(np.tile([False, True], spans), np.stack([stays, gone], axis=1).ravel())
        return hidden_L


def corrupt(tokens: IntArray, hidden: BoolArray, sentinels: IntArray) -> tuple[IntArray, IntArray]:
    """Source and target of a text, without end-of-text: hidden spans become sentinels, and the others in the target."""
    return _with_sentinels(tokens, hidden, sentinels), _with_sentinels(tokens, ~hidden, sentinels)


def _with_sentinels(tokens: IntArray, taken: BoolArray, sentinels: IntArray) -> IntArray:
    first = taken & ~np.concatenate([[False], taken[:-1]])
    marked = tokens.copy()
    marked[first] = sentinels[: int(first.sum())]
    kept: IntArray = marked[~taken | first]
    return kept


def _pieces(total: int, count: int, key: int, purpose: str) -> IntArray:
    """`total` cut into `count` pieces of at least one, [count]."""
    borders = choose(key, count - 1, total - 1, purpose=purpose) + 1
    lengths: IntArray = np.diff(np.concatenate([[0], borders, [total]]))
    return lengths


def sentinels_of(tokenizer: Tokenizer) -> IntArray:
    """Ids of the tokenizer's sentinels, the first one first.

    Raises `DataError` where there are none, or where they are not counted down from the end of the vocabulary.
    """
    found: list[int] = []
    while (token := tokenizer.vocabulary.get(SENTINEL.format(len(found)))) is not None:
        found.append(token)
    if not found:
        raise DataError(
            "the data's tokenizer has no sentinels (<extra_id_0>, ...), which mark the spans that are hidden; train "
            "one with `trine tokenizer train --roles encoder-decoder`, and prepare the data with it"
        )
    last = tokenizer.vocab_size - 1
    if found != list(range(last, last - len(found), -1)):
        raise DataError(
            f"the tokenizer's sentinels have ids {found[0]}, {found[1] if len(found) > 1 else '...'}; they must be "
            f"counted down from the end of the vocabulary, {last}, as in T5"
        )
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRows:
    """Rows for span corruption; raises `UsageError` where a row needs more sentinels than there are."""

    noise: Noise
    layout: Seq2SeqLayout
    sentinels: IntArray
    eos_id: int

    def __post_init__(self) -> None:
        if self.window_len == 0:
            raise UsageError(
                f"data.seq_len = {self.layout.source_len} leaves no room for a text with a hidden span; give more"
            )
        _, spans = self.noise.counts(self.window_len)
        if spans > len(self.sentinels):
            raise UsageError(
                f"a source of data.seq_len = {self.layout.source_len} tokens has {spans} hidden spans, but the "
                f"tokenizer has {len(self.sentinels)} sentinels; shorten data.seq_len, raise objective.mean_span, or "
                "train a tokenizer with more --sentinels"
            )

    @property
    def window_len(self) -> int:
        return self.noise.text_len(self.layout.source_len)

    @property
    def lookahead(self) -> int:
        return 0

    @property
    def identity(self) -> str:
        return f"spans-1 {self.noise} {self.sentinels[0]} {self.eos_id}"

    def make(self, drawn: Sequence[Drawn]) -> Seq2SeqBatch:
        sources, targets = [], []
        for one in drawn:
            tokens = one.window.tokens
            # A single token, the rest of a split, cannot be cut; it is hidden whole.
            alone = len(tokens) < 2
            hidden = np.ones(len(tokens), dtype=bool) if alone else self.noise.hide(len(tokens), key=one.key)
            source, target = corrupt(tokens, hidden, self.sentinels)
            sources.append(np.append(source, self.eos_id))
            targets.append(np.append(target, self.eos_id))
        return self.layout.batch(sources, targets)
