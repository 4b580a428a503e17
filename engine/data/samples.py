"""Samples cut from prepared tokens: number i as a pure function of (seed, data, i).

A source of N tokens is a ring (it ends with end-of-text, so the seam is a document border like any other). Each epoch
cuts it into N // T windows of T tokens from a new offset and visits them in a new order; both come from a hash, so
nothing has to be remembered: batches of any size, from any start, on any number of ranks, show the same samples, and
the position in the data is one integer. Over an epoch every window comes exactly once.

What becomes of windows is up to `rows.py`: the next tokens as targets, or some of the tokens hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trine.engine.data.batch import Window
from trine.engine.data.draws import sample_key
from trine.engine.data.permutation import IntArray, derive_key, permute
from trine.engine.data.rows import Drawn, NextTokenRows, Rows
from trine.engine.data.shards import TokenShards, open_together
from trine.engine.data.stream import MixedSource, SourceFacts, Stream
from trine.engine.errors import DataError, UsageError


class SampleStream(Stream):
    """Windows of tokens from weighted prepared folders.

    Attributes beside those of `Stream`: seq_len, rows. The fingerprint names data, weights, limits, seq_len, seed and
    how rows are made. A source may be given as (folder, weight). `rows` make the batches (default: each next token is
    to be predicted, documents apart with `document_mask`). Raises `DataError` for sources with different tokenizers or
    with too few tokens for a sample, `UsageError` for a limit under one sample.
    """

    def __init__(
        self,
        sources: Sequence[MixedSource | tuple[Path | str, float]],
        *,
        seq_len: int,
        seed: int,
        document_mask: bool = True,
        rows: Rows | None = None,
    ) -> None:
        if seq_len < 1:
            raise UsageError(f"sequence length {seq_len}; give at least 1")
        if not sources:
            raise UsageError("no data sources; name at least one prepared folder")
        self.rows = NextTokenRows(seq_len, document_mask=document_mask) if rows is None else rows
        mixed = [MixedSource(*source) for source in sources]
        self._shards = open_together([source.folder for source in mixed], "train")
        needed, length = self.rows.window_len + self.rows.lookahead, self.rows.window_len
        for shards in self._shards:
            if shards.num_tokens < needed:
                raise DataError(
                    f"{shards.folder} has {shards.num_tokens} tokens, a sample of length {seq_len} needs "
                    f"{needed}; give more text or a shorter seq_len"
                )
        tokens = [shards.num_tokens for shards in self._shards]
        super().__init__(mixed, sizes=[count // length for count in tokens], tokens=tokens, step=length, seed=seed)
        self.seq_len = seq_len
        self.tokens_per_sample = seq_len
        self.tokenizer_dir = self._shards[0].tokenizer_dir
        self.tokenizer_fingerprint = self._shards[0].tokenizer_fingerprint
        weights = [float(source.weight) for source in mixed]
        parts = [
            (shards.fingerprint, weight / sum(weights)) for shards, weight in zip(self._shards, weights, strict=True)
        ]
        identity = f"samples-1 {parts} {seq_len} {seed} {self.rows.identity}"
        if any(limit is not None for limit in self._limits):
            identity += f" {self._limits}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def batch(self, first_sample: int, count: int) -> Any:
        """Samples [first_sample, first_sample + count) as the batch that `rows` make."""
        wanted = self.rows.window_len + self.rows.lookahead
        return self.rows.make(
            [
                Drawn(
                    ring_window(self._shards[s], start, wanted), self._shards[s], start, sample_key(self.seed, sample)
                )
                for sample, (s, start) in enumerate(self.places(first_sample, count), start=first_sample)
            ]
        )

    def places(self, first_sample: int, count: int) -> list[tuple[int, int]]:
        """Source and first token of each of `count` samples from `first_sample` on."""
        source, index = self._assign(first_sample, count)
        return list(zip(source.tolist(), self._starts(source, index).tolist(), strict=True))

    def stamps(self) -> list[list[int]]:
        return [[found.st_size, found.st_mtime_ns] for shards in self._shards for found in map(Path.stat, shards.files)]

    def facts(self) -> list[SourceFacts]:
        return [SourceFacts(one.num_tokens, one.num_documents, one.fingerprint) for one in self._shards]

    def verify(self) -> None:
        for shards in self._shards:
            shards.verify()

    def _starts(self, source: IntArray, index: IntArray) -> IntArray:
        """First token of the `index`-th sample ever taken from `source`; all [n]."""
        length = self.rows.window_len
        sizes = np.array(self._sizes)[source]
        epoch, place = np.divmod(index, sizes)
        starts = np.empty_like(place)
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            inside = (source == s) & (epoch == e)
            shards = self._shards[s]
            key = derive_key("epoch", self.seed, s, shards.fingerprint, e)
            offset = derive_key("offset", key) % shards.num_tokens
            chosen = permute(place[inside], self._sizes[s], key)
            starts[inside] = (offset + chosen * length) % shards.num_tokens
        return starts


def ring_window(shards: TokenShards, start: int, count: int) -> Window:
    """`count` tokens from `start` on, going on at the beginning after the last token; count <= num_tokens."""
    first = min(count, shards.num_tokens - start)
    tokens, starts = shards.read(start, first), shards.document_starts(start, first) - start
    if first < count:
        tokens = np.concatenate([tokens, shards.read(0, count - first)])
        starts = np.concatenate([starts, shards.document_starts(0, count - first) + first])
    return Window(tokens, starts)
