"""Random numbers as a pure function: the n-th draw of a key, whatever was drawn before, in any process.

What an objective hides of a sample (masks, spans, partners) comes from here, keyed by the seed and the number of the
sample, which grows on through the epochs: no interruption, number of workers or size of a batch changes a draw, and
another epoch draws anew.

A draw is the finalizer of splitmix64 at key + n times the golden ratio: the generator of Steele, Lea and Flood, "Fast
splittable pseudorandom number generators" (2014), entered at any place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trine.engine.data.permutation import IntArray, derive_key, mix

FloatArray = npt.NDArray[np.float64]
_GOLDEN = 0x9E3779B97F4A7C15


def sample_key(seed: int, sample: int) -> int:
    """The key of what is drawn for a sample of training."""
    return derive_key("draws", seed, sample)


def uniform(key: int, count: int, *, purpose: str) -> FloatArray:
    """`count` numbers in [0, 1) [count]; each `purpose` has draws of its own under one key."""
    first = np.uint64(derive_key(key, purpose))
    with np.errstate(over="ignore"):
        counters = first + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        bits = mix(counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(key: int, count: int, below: int, *, purpose: str) -> IntArray:
    """`count` whole numbers in [0, below) [count]; the bias of rounding is under `below` / 2^53."""
    return (uniform(key, count, purpose=purpose) * below).astype(np.int64)


def choose(key: int, count: int, size: int, *, purpose: str) -> IntArray:
    """`count` different ones of 0 .. size - 1, ascending; every set is as likely."""
    order = np.argsort(uniform(key, size, purpose=purpose), kind="stable")
    return np.sort(order[:count])
