"""The sampler against transformers' processors, against the exact distribution, and its own promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from trine.engine.errors import UsageError
from trine.engine.generate.sampling import Sampler, SamplingParams, draw, filter_logits, request_seed

V = 97


def make_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale


def reference_scores(logits_V: torch.Tensor, params: SamplingParams, ids: list[int]) -> torch.Tensor:
    """The same row through transformers' own processors, in the order its `generate` builds them."""
    from transformers import generation

    chain = generation.LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(generation.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        chain.append(generation.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(generation.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(generation.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(generation.MinPLogitsWarper(params.min_p))
    scores = chain(torch.tensor([ids]), logits_V[None].clone())
    assert isinstance(scores, torch.Tensor)
    return scores[0]


def test_filters_equal_transformers_processors_exactly() -> None:
    grid = itertools.product((0.3, 1.0, 1.7), (0, 1, 5, 200), (1.0, 0.9, 0.4), (0.0, 0.05, 0.5), (1.0, 1.3, 0.8))
    for case, (temperature, top_k, top_p, min_p, penalty) in enumerate(grid):
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
        )
        logits_V = make_logits(case)
        ids = [3, 3, 17, case % V, int(logits_V.argmax())]
        sampler = Sampler(params, prompt_ids=ids, vocab_size=V, seed=0)
        ours_V = filter_logits(sampler.penalized(logits_V), params)
        assert torch.equal(ours_V, reference_scores(logits_V, params, ids)), params


def test_ties_and_extreme_logits_keep_what_transformers_keeps() -> None:
    tied_V = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -5.0])
    huge_V = torch.tensor([1e30, -1e30, 0.0, 3.0, 88.0, 89.0])
    for logits_V in (tied_V, huge_V):
        for params in (SamplingParams(top_k=2), SamplingParams(top_k=3, min_p=0.2), SamplingParams(top_p=1e-9)):
            assert torch.equal(filter_logits(logits_V, params), reference_scores(logits_V, params, [0]))


def test_repetition_penalty_follows_the_generated_tokens() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    logits_V = torch.tensor([1.0, 1.4, 1.2, -1.0])
    sampler = Sampler(params, prompt_ids=[0], vocab_size=4, seed=0)
    assert [sampler.next_token(logits_V) for _ in range(3)] == [1, 2, 1]
    assert logits_V.tolist() == pytest.approx([1.0, 1.4, 1.2, -1.0])


def test_presence_and_frequency_penalties_count_only_the_output() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, prompt_ids=[2, 2, 2], vocab_size=3, seed=0)
    logits_V = torch.tensor([0.0, 0.0, 3.0])
    assert sampler.next_token(logits_V) == 2
    assert sampler.penalized(logits_V).tolist() == [0.0, 0.0, 2.25]
    assert sampler.next_token(logits_V) == 2
    assert sampler.penalized(logits_V).tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.8, temperature=1.3),
        SamplingParams(min_p=0.1, top_k=20),
    ],
)
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    logits_V = make_logits(11, scale=1.5)[:24]
    expected_V = filter_logits(logits_V.double(), params).softmax(-1)
    sampler = Sampler(params, prompt_ids=[], vocab_size=24, seed=5)
    num_draws = 20_000
    counts_V = torch.zeros(24, dtype=torch.float64)
    for _ in range(num_draws):
        counts_V[sampler.next_token(logits_V)] += 1
    possible_V = expected_V > 0
    assert counts_V[~possible_V].sum() == 0
    expected = expected_V[possible_V] * num_draws
    statistic = ((counts_V[possible_V] - expected) ** 2 / expected).sum().item()
    # Wilson-Hilferty: (chi2 / df)^(1/3) is close to normal; 4 standard deviations is p = 3e-5.
    freedom = int(possible_V.sum()) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4


def test_draw_never_takes_an_impossible_id() -> None:
    logits_V = torch.full((6,), -math.inf)
    logits_V[3] = 0.0
    generator = torch.Generator().manual_seed(0)
    assert {draw(logits_V, generator) for _ in range(200)} == {3}


def test_seed_fixes_the_draws_and_choices_differ() -> None:
    params = SamplingParams(seed=7, n=3)
    seeds = [request_seed(params, [1, 2], choice) for choice in range(3)]
    assert seeds == [request_seed(params, (1, 2), choice) for choice in range(3)]
    assert len({*seeds, request_seed(params, [1, 3], 0)}) == 4
    rows = [make_logits(row) for row in range(20)]

    def run(seed: int) -> list[int]:
        sampler = Sampler(params, prompt_ids=[], vocab_size=V, seed=seed)
        return [sampler.next_token(row) for row in rows]

    assert run(seeds[0]) == run(seeds[0])
    assert run(seeds[0]) != run(seeds[1])
    assert request_seed(SamplingParams(), [], 0) != request_seed(SamplingParams(), [], 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("max_tokens", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", "text"),
        ("n", 0),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_number_given_as_text_is_not_asked_to_be_a_tuple() -> None:
    wrong: Any = "1"
    with pytest.raises(UsageError, match=r"temperature must be no string: float, got the string '1'"):
        SamplingParams(temperature=wrong)


def test_many_greedy_completions_of_one_prompt_are_refused() -> None:
    with pytest.raises(UsageError, match="temperature 0"):
        SamplingParams(temperature=0, n=2)
