"""Rejection sampling over guesses keeps the distribution that is asked for, whatever the guesses come from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.errors import NonFiniteError, UsageError
from trine.engine.generate.rejection import Guess, choose_over_guesses, distribution
from trine.engine.generate.sampling import Sampler, SamplingParams, pick

V = 12
COUNT = 2500


def logits(seed: int) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 1.5


def sampler(seed: int, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt_ids=(1, 2), vocab_size=V, seed=seed)


def outcomes(p_logits_V: Tensor, q_V: Tensor, **params: Any) -> tuple[Counter[int], int]:
    """Chosen tokens over many independent guesses from q, and how many guesses stood."""
    samplers = [sampler(seed, **params) for seed in range(COUNT)]
    guesses = [Guess(pick(q_V, one.uniform()), q_V) for one in samplers]
    chosen = choose_over_guesses(p_logits_V.expand(COUNT, V), samplers, [None] * COUNT, guesses)
    assert all(one.num_chosen == 1 for one in samplers)
    tokens = [token for token in chosen if isinstance(token, int)]
    assert len(tokens) == COUNT
    return Counter(tokens), sum(token == guess.token for token, guess in zip(tokens, guesses, strict=True))


def fits(counts: Counter[int], p_V: Tensor) -> bool:
    """A chi-square test at 99.9 % (by Wilson and Hilferty's formula); tokens that cannot come must not have come."""
    possible = p_V.nonzero()[:, 0].tolist()
    assert set(counts) <= set(possible)
    expected = {token: COUNT * float(p_V[token]) for token in possible}
    freedom = len(possible) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return sum((counts[token] - wanted) ** 2 / wanted for token, wanted in expected.items()) < critical


@pytest.mark.parametrize(
    ("draft", "params"),
    [
        ("near", {}),
        ("far", {}),
        ("one token", {}),
        ("near", {"temperature": 1.7}),
        ("far", {"top_k": 7}),
        ("near", {"top_p": 0.9, "temperature": 1.3}),
        ("far", {"banned_ids": tuple(range(8))}),
    ],
    ids=str,
)
def test_the_distribution_is_that_without_guesses(draft: str, params: dict[str, Any]) -> None:
    p_logits_V = logits(0)
    q_V = {
        "near": (p_logits_V + 0.3 * logits(1)).softmax(-1, torch.float64),
        "far": logits(2).softmax(-1, torch.float64),
        "one token": torch.eye(V, dtype=torch.float64)[int(p_logits_V.argmax())],
    }[draft]
    one = sampler(0, **params)
    p_V = distribution(one.adjusted(p_logits_V), one.params)
    counts, stood = outcomes(p_logits_V, q_V, **params)
    assert fits(counts, p_V)
    overlap = float(torch.minimum(p_V, q_V).sum())
    assert abs(stood / COUNT - overlap) < 4 * math.sqrt(0.25 / COUNT)  # as many stand as can


def test_the_test_would_see_a_distribution_that_is_off() -> None:
    p_V = logits(0).softmax(-1, torch.float64)
    counts, _ = outcomes(logits(0) + 0.3 * logits(5), p_V)
    assert not fits(counts, p_V)


def test_a_guess_from_the_same_distribution_always_stands() -> None:
    p_V = logits(0).softmax(-1, dtype=torch.float64)
    assert outcomes(logits(0), p_V)[1] == COUNT


def test_rows_without_guesses_and_rows_that_fail_are_chosen_as_ever() -> None:
    rows = torch.stack([logits(0), torch.full((V,), torch.nan), logits(0), logits(0), torch.full((V,), -torch.inf)])
    guess = Guess(3, torch.full((V,), 1 / V, dtype=torch.float64))
    samplers = [sampler(1, temperature=0.0), sampler(2), sampler(3), sampler(4), sampler(5)]
    refused = UsageError("the grammar is too complex")
    found = choose_over_guesses(rows, samplers, [None, None, None, refused, None], [None, guess, guess, guess, guess])
    assert found[0] == int(logits(0).argmax())
    assert isinstance(found[1], NonFiniteError)
    assert isinstance(found[2], int)
    assert found[3] is refused
    assert isinstance(found[4], NonFiniteError)
    assert [one.num_chosen for one in samplers] == [1, 0, 1, 0, 0]


def test_what_is_not_allowed_falls() -> None:
    allowed_V = torch.zeros(V, dtype=torch.bool)
    allowed_V[[4, 5]] = True
    q_V = torch.full((V,), 1 / V, dtype=torch.float64)
    params = SamplingParams()
    for seed in range(50):
        one = Sampler(replace(params), prompt_ids=(1,), vocab_size=V, seed=seed)
        (token,) = choose_over_guesses(logits(0)[None], [one], [allowed_V], [Guess(seed % V, q_V)])
        assert token in (4, 5)
