"""The training order of any kind of data: sample i as a pure function of (seed, data, i).

A stream deals sample numbers to its sources by their weights and limits (`mixture.py`) and makes batches of any run of
samples; it has no state, so the position in the data is one integer. `samples.py` cuts samples from tokens,
`example_stream.py` takes them from examples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trine.engine.data.mixture import Mixture
from trine.engine.data.permutation import IntArray
from trine.engine.errors import UsageError


class MixedSource(NamedTuple):
    """A source in a mixture: its weight, and how often or how much of it may be seen (None: without limit).

    A source that has given `max_epochs` times its samples, or `max_tokens` tokens, gives no more; see `mixture`.
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


class SourceFacts(NamedTuple):
    """What a source holds: tokens, and documents or examples; `fingerprint` names all of it."""

    num_tokens: int
    num_items: int
    fingerprint: str


class Stream(ABC):
    """A sequence of samples from weighted sources, endless unless every source has a limit.

    Attributes: sources, seed, num_samples (None: endless), endings (the first samples that some source has nothing left
    for), samples_per_epoch (of all sources together), num_tokens (likewise), tokens_per_sample (on average, as far as
    it is known before a batch is made), tokenizer_dir, tokenizer_fingerprint, fingerprint (names the sequence).
    """

    fingerprint: str
    tokenizer_dir: Path
    tokenizer_fingerprint: str
    tokens_per_sample: float

    def __init__(
        self, sources: Sequence[MixedSource], *, sizes: Sequence[int], tokens: Sequence[int], step: int, seed: int
    ) -> None:
        """`sizes`: samples of an epoch of each source; `tokens`: its tokens, `step` of which a sample takes."""
        self.sources = list(sources)
        self.seed = seed
        self._sizes, self._tokens = list(sizes), list(tokens)
        self._limits = [_limit(source, size, step) for source, size in zip(self.sources, self._sizes, strict=True)]
        self._mixture = Mixture([float(source.weight) for source in self.sources], seed=seed, limits=self._limits)
        self.num_samples = self._mixture.num_samples
        self.endings = [sample for sample, _ in self._mixture.endings()]
        self.samples_per_epoch = sum(self._sizes)
        self.num_tokens = sum(self._tokens)

    @abstractmethod
    def batch(self, first_sample: int, count: int) -> Any:
        """Samples [first_sample, first_sample + count) as a batch."""

    @abstractmethod
    def stamps(self) -> list[list[int]]:
        """Size in bytes and time of change (ns) of each file; while they stay as they are, nobody has written to it."""

    @abstractmethod
    def facts(self) -> list[SourceFacts]:
        """Of each source."""

    @abstractmethod
    def verify(self) -> None:
        """Read everything and compare with the fingerprint; raises `DataError` on a difference."""

    def uses(self, num_samples: int) -> list[SourceUse]:
        """What the first `num_samples` take from each source."""
        taken = self._mixture.taken(num_samples).tolist()
        ends_at = {s: sample for sample, ended in self._mixture.endings() for s in ended}
        parts = zip(self.sources, self._sizes, self._tokens, self._limits, taken, strict=True)
        return [
            SourceUse(source, tokens, limit, count, count / size, ends_at.get(s))
            for s, (source, size, tokens, limit, count) in enumerate(parts)
        ]

    def _assign(self, first_sample: int, count: int) -> tuple[IntArray, IntArray]:
        """The source of each of `count` samples, and how many came from it before."""
        if first_sample < 0 or count < 1:
            raise UsageError(f"{count} samples from number {first_sample}; both should be positive")
        return self._mixture.assign(np.arange(first_sample, first_sample + count, dtype=np.int64))


def _limit(source: MixedSource, size: int, step: int) -> int | None:
    """How many samples a source gives at most."""
    limits = []
    if source.max_epochs is not None:
        limits.append(math.floor(source.max_epochs * size))
    if source.max_tokens is not None:
        limits.append(source.max_tokens // step)
    if not limits:
        return None
    if min(limits) < 1:
        raise UsageError(
            f"max_epochs = {source.max_epochs} and max_tokens = {source.max_tokens} of {source.folder} allow not even "
            f"one sample of {step} tokens; raise them or leave the source out"
        )
    return min(limits)
