"""Which source the i-th sample of a weighted mixture comes from, as a pure function of i.

Samples are dealt in blocks of `BLOCK`. Each block holds the same number from each source, as near to its weight as
whole numbers can be (largest remainder), in an order shuffled anew for every block.

A source may have a limit. The blocks go on as long as every source in them can give its number; one shorter block then
takes what the source that runs out still has, and of the others in proportion, so that the shares hold to the end. From
there on the rest share the samples by their weights, until none is left: the stretches between are called phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trine.engine.data.permutation import IntArray, derive_key, permute
from trine.engine.errors import UsageError

BLOCK = 1000


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch in which the same sources are dealt. All arrays are [number of sources]."""

    first_sample: int
    first_block: int
    counts: IntArray  # of each source in a full block
    last_counts: IntArray  # of each source in the shorter block at the end
    taken: IntArray  # samples of each source before this phase
    num_blocks: int | None  # full blocks; None: without end

    @property
    def end(self) -> int | None:
        """The first sample after this phase."""
        if self.num_blocks is None:
            return None
        return self.first_sample + self.num_blocks * BLOCK + int(self.last_counts.sum())


class Mixture:
    """Deals sample numbers to sources in proportion to `weights`, which need not sum to one.

    limits: how many samples a source gives at most (at least 1); None has no limit.
    Attributes: phases; num_samples, after which every source has given what it may (None: never).
    """

    def __init__(self, weights: Sequence[float], *, seed: int, limits: Sequence[int | None] | None = None) -> None:
        self._seed = seed
        self._limits = [None] * len(weights) if limits is None else list(limits)
        self.phases = _phases(weights, self._limits)
        self.num_samples = self.phases[-1].end

    def assign(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """For sample numbers [n]: the source of each [n], and how many came from that source before it [n].

        Raises `UsageError` for samples behind the last one.
        """
        if self.num_samples is not None and samples.size and int(samples.max()) >= self.num_samples:
            raise UsageError(
                f"sample {int(samples.max())} of a mixture whose limits allow {self.num_samples}; "
                "raise max_epochs or max_tokens of a source"
            )
        source, index = np.empty_like(samples), np.empty_like(samples)
        numbers = np.searchsorted([phase.first_sample for phase in self.phases], samples, side="right") - 1
        for number in np.unique(numbers):
            inside = numbers == number
            source[inside], index[inside] = self._assign_in(self.phases[number], samples[inside])
        return source, index

    def taken(self, num_samples: int) -> IntArray:
        """How many of the first `num_samples` come from each source, [number of sources]."""
        phase = next(p for p in reversed(self.phases) if p.first_sample <= num_samples)
        blocks = (num_samples - phase.first_sample) // BLOCK
        if phase.num_blocks is not None:
            blocks = min(blocks, phase.num_blocks)
        begun = np.arange(phase.first_sample + blocks * BLOCK, num_samples, dtype=np.int64)
        rest = np.bincount(self.assign(begun)[0], minlength=len(phase.counts))
        return np.asarray(phase.taken + blocks * phase.counts + rest)

    def endings(self) -> list[tuple[int, list[int]]]:
        """(first sample without them, the sources that have given what they may), in order."""
        ends = []
        for phase in self.phases:
            if phase.end is None:
                break
            given = phase.taken + (phase.num_blocks or 0) * phase.counts + phase.last_counts
            left = [s for s, limit in enumerate(self._limits) if phase.counts[s] and given[s] == limit]
            ends.append((phase.end, left))
        return ends

    def _assign_in(self, phase: Phase, samples: IntArray) -> tuple[IntArray, IntArray]:
        blocks, places = np.divmod(samples - phase.first_sample, BLOCK)
        if len(phase.counts) == 1:
            return np.zeros_like(samples), samples - phase.first_sample
        source, index = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            inside = blocks == block
            counts = phase.last_counts if block == phase.num_blocks else phase.counts
            key = derive_key("mixture", self._seed, phase.first_block + block)
            slots = permute(places[inside], int(counts.sum()), key)
            bounds = np.cumsum([0, *counts])
            source[inside] = np.searchsorted(bounds, slots, side="right") - 1
            before = phase.taken + block * phase.counts
            index[inside] = before[source[inside]] + slots - bounds[source[inside]]
        return source, index


def _phases(weights: Sequence[float], limits: Sequence[int | None]) -> list[Phase]:
    taken = np.zeros(len(weights), dtype=np.int64)
    sample = block = 0
    phases: list[Phase] = []
    while True:
        active = [s for s, limit in enumerate(limits) if limit is None or taken[s] < limit]
        if not active:
            return phases
        counts = np.zeros_like(taken)
        counts[active] = _whole_counts([weights[s] for s in active])
        left = {s: limit - int(taken[s]) for s in active if (limit := limits[s]) is not None}
        if not left:
            return [*phases, Phase(sample, block, counts, np.zeros_like(counts), taken, None)]
        num_blocks = min(rest // int(counts[s]) for s, rest in left.items())
        # The source that runs out is the one with the smallest part of a block left; compared as fractions, exactly.
        rests = {s: rest - num_blocks * int(counts[s]) for s, rest in left.items()}
        out = min(rests, key=lambda s: (Fraction(rests[s], int(counts[s])), s))
        last_counts = counts * rests[out] // counts[out]
        phases.append(Phase(sample, block, counts, last_counts, taken, num_blocks))
        sample += num_blocks * BLOCK + int(last_counts.sum())
        block += num_blocks + 1
        taken = taken + num_blocks * counts + last_counts


def _whole_counts(weights: Sequence[float]) -> list[int]:
    for weight in weights:
        if not (weight > 0 and np.isfinite(weight)):
            raise UsageError(f"source weight {weight} should be a number above 0")
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    for weight, count in zip(weights, counts, strict=True):
        if count == 0:
            raise UsageError(f"source weight {weight} is under 1/{BLOCK} of all weights; leave it out or raise it")
    return counts
