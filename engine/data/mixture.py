"""Which source the i-th sample of a weighted mixture comes from, as a pure function of i.

Samples are dealt in blocks of `BLOCK`. Each block holds the same number from each source, as near to its weight as
whole numbers can be (largest remainder), in an order shuffled anew for every block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trine.engine.data.permutation import IntArray, derive_key, permute
from trine.engine.errors import UsageError

BLOCK = 1000


class Mixture:
    """Deals sample numbers to sources in proportion to `weights`, which need not sum to one."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self._seed = seed
        self._counts = _whole_counts(weights)
        self._bounds = np.cumsum([0, *self._counts])

    def assign(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """For sample numbers [n]: the source of each [n], and how many came from that source before it [n]."""
        if len(self._counts) == 1:
            return np.zeros_like(samples), samples
        blocks, places = np.divmod(samples, BLOCK)
        slots = np.empty_like(places)
        for block in np.unique(blocks):
            inside = blocks == block
            slots[inside] = permute(places[inside], BLOCK, derive_key("mixture", self._seed, block))
        source = np.searchsorted(self._bounds, slots, side="right") - 1
        return source, blocks * np.array(self._counts)[source] + slots - self._bounds[source]


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
