"""Draws are functions of their key, and as random as they claim."""

from __future__ import annotations

import numpy as np

from trine.engine.data.draws import choose, integers, sample_key, uniform


def test_a_draw_depends_on_key_and_purpose_alone() -> None:
    whole = uniform(7, 100, purpose="a")
    np.testing.assert_array_equal(uniform(7, 40, purpose="a"), whole[:40])
    assert not np.array_equal(uniform(7, 100, purpose="b"), whole)
    assert not np.array_equal(uniform(8, 100, purpose="a"), whole)
    assert sample_key(0, 1) != sample_key(1, 0)


def test_draws_are_uniform() -> None:
    numbers = uniform(3, 100_000, purpose="a")
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation sqrt(98).
    assert abs(((counts - 2000) ** 2 / 2000).sum() - 49) < 3 * np.sqrt(98)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 3 / np.sqrt(len(numbers))
    assert set(integers(3, 1000, 5, purpose="b").tolist()) == set(range(5))


def test_every_set_is_as_likely() -> None:
    found = [tuple(choose(key, 2, 4, purpose="a").tolist()) for key in range(3000)]
    assert all(one < two for one, two in found)
    counts = np.array([found.count(pair) for pair in sorted(set(found))])
    assert len(counts) == 6
    assert abs(((counts - 500) ** 2 / 500).sum() - 5) < 3 * np.sqrt(10)
