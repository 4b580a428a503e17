"""Mixing sources: exact shares, and a place for every sample that is a pure function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.engine.data.mixture import BLOCK, Mixture
from trine.engine.errors import UsageError

PROFILE = settings(derandomize=True, deadline=None, max_examples=80)
mixtures = st.integers(1, 5).flatmap(
    lambda number: st.tuples(
        st.lists(st.floats(0.05, 5.0), min_size=number, max_size=number),
        st.lists(st.none() | st.integers(1, 4000), min_size=number, max_size=number),
    )
)


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


@PROFILE
@given(mixture=mixtures, data=st.data())
def test_with_limits_every_source_gives_each_sample_once_and_then_no_more(mixture: Any, data: st.DataObject) -> None:
    weights, limits = mixture
    dealt = Mixture(weights, seed=7, limits=limits)
    total = sum(limits) if None not in limits else None
    assert dealt.num_samples == total
    upto = min(total or 20_000, 20_000)
    source, index = dealt.assign(np.arange(upto))
    for number, limit in enumerate(limits):
        taken = index[source == number]
        assert limit is None or len(taken) <= limit
        assert len(set(taken.tolist())) == len(taken)
        if upto == total:
            np.testing.assert_array_equal(np.sort(taken), np.arange(limit))  # type: ignore[arg-type]
    # A pure function of the number: any batches, in any order, give the same.
    first = data.draw(st.integers(0, upto - 1))
    some = np.random.default_rng(first).permutation(np.arange(first, min(first + 50, upto)))
    np.testing.assert_array_equal(dealt.assign(some), (source[some], index[some]))
    # What has been taken so far, at any number, without counting.
    np.testing.assert_array_equal(dealt.taken(first), np.bincount(source[:first], minlength=len(weights)))


@PROFILE
@given(mixture=mixtures)
def test_the_shares_hold_until_a_source_ends_and_then_among_the_rest(mixture: Any) -> None:
    weights, limits = mixture
    dealt = Mixture(weights, seed=7, limits=limits)
    left = list(range(len(weights)))
    begin = 0
    for end, ended in dealt.endings():
        counts = dealt.taken(end) - dealt.taken(begin)
        shares = np.array([weights[s] if s in left else 0.0 for s in range(len(weights))])
        # Whole numbers in each block, so at most one off in a block; two in the last, which is rounded down.
        blocks = (end - begin) // BLOCK + 2
        assert np.abs(counts - (end - begin) * shares / shares.sum()).max() <= blocks
        assert ended
        assert all(dealt.taken(end)[s] == limits[s] for s in ended)
        assert dealt.taken(end).sum() == end
        left = [s for s in left if s not in ended]
        begin = end
    assert [s for s in left if limits[s] is not None] == []
    assert (dealt.num_samples is None) == bool(left)


def test_a_source_without_limits_beside_it_changes_nothing_before_it_ends() -> None:
    free, limited = Mixture([2, 1, 1], seed=5), Mixture([2, 1, 1], seed=5, limits=[None, 2000, None])
    (end, ended), *more = limited.endings()
    assert (ended, more) == ([1], [])
    assert end == 8 * BLOCK
    samples = np.arange(end)
    np.testing.assert_array_equal(free.assign(samples), limited.assign(samples))
    later = np.bincount(limited.assign(np.arange(end, end + BLOCK))[0], minlength=3)
    assert later.tolist() == [667, 0, 333]


def test_samples_behind_the_last_one_are_refused() -> None:
    mixture = Mixture([1, 1], seed=0, limits=[10, 20])
    assert mixture.num_samples == 30
    assert np.bincount(mixture.assign(np.arange(30))[0]).tolist() == [10, 20]
    with pytest.raises(UsageError, match="sample 30 of a mixture whose limits allow 30; raise max_epochs"):
        mixture.assign(np.array([3, 30]))


def test_the_order_of_limited_mixtures_is_kept() -> None:
    # Runs are resumed by later versions: this may only change together with the name in SampleStream.fingerprint.
    source, index = Mixture([3, 1, 1], seed=11, limits=[None, 40, 5]).assign(np.arange(0, 300, 13))
    assert "".join(map(str, source.tolist())) == "011000010000000000000000"
    assert index.tolist()[:8] == [4, 3, 19, 41, 113, 25, 60, 12]
    assert index.tolist()[8:16] == [78, 98, 116, 64, 67, 694, 600, 120]


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [1, 10_000]])
def test_weights_that_cannot_be_honoured_are_refused(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="source weight"):
        Mixture(weights, seed=0)
