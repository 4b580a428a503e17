"""Mixing sources: exact shares, and a place for every sample that is a pure function."""

from __future__ import annotations

import numpy as np
import pytest

from trine.engine.data.mixture import BLOCK, Mixture
from trine.engine.errors import UsageError


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [1, 1, 1], [998, 1, 1], [0.125] * 8])
def test_each_block_holds_the_share_of_each_source(weights: list[float]) -> None:
    source, index = Mixture(weights, seed=3).assign(np.arange(4 * BLOCK))
    for block in range(4):
        counts = np.bincount(source[block * BLOCK : (block + 1) * BLOCK], minlength=len(weights))
        assert np.abs(counts - BLOCK * np.array(weights) / sum(weights)).max() < 1
    for number in range(len(weights)):
        taken = np.sort(index[source == number])
        np.testing.assert_array_equal(taken, np.arange(len(taken)))  # nothing twice, nothing left out


def test_assignment_does_not_depend_on_how_it_is_asked() -> None:
    mixture = Mixture([2, 1], seed=0)
    source, index = mixture.assign(np.arange(3000))
    for i in (0, 1, 999, 1000, 2345):
        alone = mixture.assign(np.array([i]))
        assert (alone[0][0], alone[1][0]) == (source[i], index[i])
    shuffled = np.random.default_rng(0).permutation(3000)
    np.testing.assert_array_equal(mixture.assign(shuffled)[1], index[shuffled])


def test_sources_are_interleaved_differently_in_each_block_and_for_each_seed() -> None:
    source = Mixture([1, 1], seed=0).assign(np.arange(2 * BLOCK))[0]
    assert 0.3 < (source[:BLOCK] != source[BLOCK:]).mean() < 0.7
    assert 0.3 < (source != Mixture([1, 1], seed=1).assign(np.arange(2 * BLOCK))[0]).mean() < 0.7
    assert np.abs(np.diff(source)).mean() > 0.3


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [1, 10_000]])
def test_weights_that_cannot_be_honoured_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="source weight"):
        Mixture(weights, seed=0)
