"""Random order as a pure function.

Shuffling a list needs the whole list and its history. Here the shuffled place of item i is computed from (key, i)
alone: a Feistel network is a bijection of 0 .. 4^k - 1 whatever its round function; values that fall outside 0 .. n - 1
are sent through again until they fall inside ("cycle walking"), which is a bijection of 0 .. n - 1.
Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_ROUNDS = 6


def derive_key(*parts: object) -> int:
    """64 bits from any printable parts: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """Places of the items `index` (any shape, each in [0, size)) in the permutation of `size` that `key` names."""
    if size == 1:
        return np.zeros_like(index)
    half = (max(size - 1, 1).bit_length() + 1) // 2
    keys = [
        mix(np.array([(key + round_number * 0x9E3779B97F4A7C15) % 2**64], np.uint64)) for round_number in range(_ROUNDS)
    ]
    value = index.astype(np.uint64).ravel()
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, keys)
        outside &= value >= np.uint64(size)
    return value.astype(np.int64).reshape(index.shape)


def _feistel(value: npt.NDArray[np.uint64], half: int, keys: list[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << bits) | right


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014): every bit of the result depends on every bit of the value."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
