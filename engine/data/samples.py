"""The training order: sample i as a pure function of (seed, data, i).

A source of N tokens is a ring (it ends with end-of-text, so the seam is a document border like any other). Each epoch
cuts it into N // T windows of T tokens from a new offset and visits them in a new order; both come from a hash, so
nothing has to be remembered: batches of any size, from any start, on any number of ranks, show the same samples, and
the position in the data is one integer. Over an epoch every window comes exactly once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trine.engine.data.batch import Batch, Window, make_batch
from trine.engine.data.mixture import Mixture
from trine.engine.data.permutation import IntArray, derive_key, permute
from trine.engine.data.shards import TokenShards, open_together
from trine.engine.errors import DataError, UsageError


class MixedSource(NamedTuple):
    """A prepared folder in a mixture: its weight, and how often or how much of it may be seen (None: without limit).

    A source that has given `max_epochs` times its windows, or `max_tokens` tokens, gives no more; see `mixture`.
    """

    folder: Path | str
    weight: float = 1.0
    max_epochs: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What a number of samples takes from one source. `ends_at`: the first sample when it has nothing left, or None."""

    source: MixedSource
    num_tokens: int  # of the source
    limit: int | None  # samples it gives at most
    samples: int  # taken
    epochs: float  # taken
    ends_at: int | None


class SampleStream:
    """A sequence of windows of `seq_len` tokens from weighted prepared folders; it has no state.

    It is endless, unless every source has a limit.

    Attributes: fingerprint (names the sequence: data, weights, limits, seq_len, seed, document_mask), tokenizer_dir,
    tokenizer_fingerprint, num_tokens (of all sources), samples_per_epoch (windows of all sources together), seq_len,
    num_samples (None: endless), endings (the first samples that some source has nothing left for).
    A source may be given as (folder, weight). Raises `DataError` for sources with different tokenizers or with fewer
    than seq_len + 1 tokens, `UsageError` for a limit under one sample.
    """

    def __init__(
        self,
        sources: Sequence[MixedSource | tuple[Path | str, float]],
        *,
        seq_len: int,
        seed: int,
        document_mask: bool = True,
    ) -> None:
        if seq_len < 1:
            raise UsageError(f"sequence length {seq_len}; give at least 1")
        if not sources:
            raise UsageError("no data sources; name at least one prepared folder")
        self.sources = [MixedSource(*source) for source in sources]
        self._shards = open_together([source.folder for source in self.sources], "train")
        for shards in self._shards:
            if shards.num_tokens <= seq_len:
                raise DataError(
                    f"{shards.folder} has {shards.num_tokens} tokens, a sample of length {seq_len} needs "
                    f"{seq_len + 1}; give more text or a shorter seq_len"
                )
        weights = [float(source.weight) for source in self.sources]
        limits = [_limit(*pair, seq_len) for pair in zip(self.sources, self._shards, strict=True)]
        self.seq_len = seq_len
        self.seed = seed
        self.document_mask = document_mask
        self.tokenizer_dir = self._shards[0].tokenizer_dir
        self.tokenizer_fingerprint = self._shards[0].tokenizer_fingerprint
        self.num_tokens = sum(shards.num_tokens for shards in self._shards)
        self.samples_per_epoch = sum(shards.num_tokens // seq_len for shards in self._shards)
        self._limits = limits
        self._mixture = Mixture(weights, seed=seed, limits=limits)
        self.num_samples = self._mixture.num_samples
        self.endings = [sample for sample, _ in self._mixture.endings()]
        parts = [
            (shards.fingerprint, weight / sum(weights)) for shards, weight in zip(self._shards, weights, strict=True)
        ]
        identity = f"samples-1 {parts} {seq_len} {seed} {document_mask}"
        if any(limit is not None for limit in limits):
            identity += f" {limits}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples [first_sample, first_sample + count) as a batch [count, seq_len]."""
        windows = [
            ring_window(self._shards[s], start, self.seq_len + 1) for s, start in self.places(first_sample, count)
        ]
        return make_batch(windows, seq_len=self.seq_len, document_mask=self.document_mask)

    def places(self, first_sample: int, count: int) -> list[tuple[int, int]]:
        """Source and first token of each of `count` samples from `first_sample` on."""
        if first_sample < 0 or count < 1:
            raise UsageError(f"{count} samples from number {first_sample}; both should be positive")
        source, index = self._mixture.assign(np.arange(first_sample, first_sample + count, dtype=np.int64))
        return list(zip(source.tolist(), self._starts(source, index).tolist(), strict=True))

    def uses(self, num_samples: int) -> list[SourceUse]:
        """What the first `num_samples` take from each source."""
        taken = self._mixture.taken(num_samples).tolist()
        ends_at = {s: sample for sample, ended in self._mixture.endings() for s in ended}
        return [
            SourceUse(
                source, shards.num_tokens, limit, count, count / (shards.num_tokens // self.seq_len), ends_at.get(s)
            )
            for s, (source, shards, limit, count) in enumerate(
                zip(self.sources, self._shards, self._limits, taken, strict=True)
            )
        ]

    def stamps(self) -> list[list[int]]:
        """Size in bytes and time of change (ns) of each file of tokens and borders.

        While they stay as they are, nobody has written to these files.
        """
        return [[found.st_size, found.st_mtime_ns] for shards in self._shards for found in map(Path.stat, shards.files)]

    def verify(self) -> None:
        """Read all tokens and compare with the fingerprints; raises `DataError` on a difference."""
        for shards in self._shards:
            shards.verify()

    def _starts(self, source: IntArray, index: IntArray) -> IntArray:
        """First token of the `index`-th sample ever taken from `source`; all [n]."""
        sizes = np.array([shards.num_tokens for shards in self._shards])[source]
        epoch, place = np.divmod(index, sizes // self.seq_len)
        starts = np.empty_like(place)
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            inside = (source == s) & (epoch == e)
            shards = self._shards[s]
            key = derive_key("epoch", self.seed, s, shards.fingerprint, e)
            offset = derive_key("offset", key) % shards.num_tokens
            chosen = permute(place[inside], shards.num_tokens // self.seq_len, key)
            starts[inside] = (offset + chosen * self.seq_len) % shards.num_tokens
        return starts


def _limit(source: MixedSource, shards: TokenShards, seq_len: int) -> int | None:
    """How many samples a source gives at most."""
    limits = []
    if source.max_epochs is not None:
        limits.append(math.floor(source.max_epochs * (shards.num_tokens // seq_len)))
    if source.max_tokens is not None:
        limits.append(source.max_tokens // seq_len)
    if not limits:
        return None
    if min(limits) < 1:
        raise UsageError(
            f"max_epochs = {source.max_epochs} and max_tokens = {source.max_tokens} of {source.folder} allow not even "
            f"one sample of {seq_len} tokens; raise them or leave the source out"
        )
    return min(limits)


def ring_window(shards: TokenShards, start: int, count: int) -> Window:
    """`count` tokens from `start` on, going on at the beginning after the last token; count <= num_tokens."""
    first = min(count, shards.num_tokens - start)
    tokens, starts = shards.read(start, first), shards.document_starts(start, first) - start
    if first < count:
        tokens = np.concatenate([tokens, shards.read(0, count - first)])
        starts = np.concatenate([starts, shards.document_starts(0, count - first) + first])
    return Window(tokens, starts)
