"""Drafts from what followed the same tokens before, against the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.engine.generate.lookup import propose


def by_definition(tokens: list[int], max_tokens: int, longest: int, shortest: int, window: int) -> list[int]:
    recent = tokens[-window:]
    for length in range(longest, shortest - 1, -1):
        for end in range(len(recent) - 1, length - 1, -1):
            if recent[end - length : end] == recent[len(recent) - length :]:
                guess = list(recent)
                while len(guess) < len(recent) + max_tokens:
                    guess.append(guess[len(guess) - (len(recent) - end)])
                return guess[len(recent) :]
    return []


@given(
    # Tokens whose bytes overlap in all manners when read across their borders.
    tokens=st.lists(st.sampled_from([0, 1, 256, 257, 1 << 32, 65793]), max_size=40),
    max_tokens=st.integers(1, 9),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
    window=st.integers(1, 50),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_the_guess_is_that_of_the_definition(
    tokens: list[int], max_tokens: int, shortest: int, more: int, window: int
) -> None:
    options = {"max_tokens": max_tokens, "longest": shortest + more, "shortest": shortest, "window": window}
    assert propose(tokens, **options) == by_definition(tokens, max_tokens, shortest + more, shortest, window)


def test_the_newest_place_of_the_longest_ending_is_taken() -> None:
    tokens = [1, 2, 3, 10, 11, 9, 2, 3, 20, 21, 1, 2, 3, 30, 31, 8, 2, 3, 40, 7, 1, 2, 3]
    assert propose(tokens, max_tokens=2, longest=3) == [30, 31]
    assert propose(tokens, max_tokens=2, longest=2) == [40, 7]


def test_a_repetition_goes_on() -> None:
    assert propose([5, 1, 2, 1, 2], max_tokens=5) == [1, 2, 1, 2, 1]


def test_nothing_is_guessed_without_a_repeated_ending() -> None:
    assert propose([], max_tokens=4) == []
    assert propose([1], max_tokens=4, shortest=1) == []
    assert propose([1, 2, 3, 4], max_tokens=4) == []
    assert propose([3, 1, 2, 3], max_tokens=4, shortest=2) == []


def test_only_the_window_is_searched() -> None:
    tokens = [1, 2, 3, *range(100, 200), 1, 2]
    assert propose(tokens, max_tokens=1) == [3]
    assert propose(tokens, max_tokens=1, window=50) == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 1, "shortest": 0},
        {"max_tokens": 1, "window": 0},
        {"max_tokens": 1, "longest": 1},
    ],
)
def test_impossible_lengths_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        propose([1, 2], **options)
