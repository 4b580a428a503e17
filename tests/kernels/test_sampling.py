"""Sampling on the CPU: the filters of the plain sampler, the distribution of draws, refusals, configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.generate import sampling as plain
from trine.engine.generate.sampling import SamplingParams
from trine.kernels.sampling.op import SAMPLE, SAMPLE_ROW, add_bias, filtered_weights, penalize, sample
from trine.kernels.target import COMPILED

FILTERS = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (30, 0.9, 0.02), (1, 1.0, 0.0), (0, 1e-6, 0.0)]


def make(count: int = 4, size: int = 50, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits_RV": 2 * torch.randn(count, size, generator=generator),
        "uniforms_R": torch.rand(count, generator=generator, dtype=torch.float64),
        "temperature_R": torch.full((count,), 0.8),
        "top_k_R": torch.zeros(count, dtype=torch.int32),
        "top_p_R": torch.ones(count),
        "min_p_R": torch.zeros(count),
    } | changes


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_filters_keep_what_the_plain_sampler_keeps(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits_RV = make(8, 400)["logits_RV"]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = [torch.full((8,), value) for value in (temperature, top_p, min_p)]
    weights = filtered_weights(logits_RV, rows[0], torch.full((8,), top_k, dtype=torch.int32), rows[1], rows[2])
    for row, logits_V in enumerate(logits_RV):
        expected = plain.filter_logits(logits_V, params)
        assert torch.equal(weights[row] > 0, expected > float("-inf"))
        torch.testing.assert_close(weights[row] / weights[row].sum(), expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_draws_are_those_of_the_plain_sampler() -> None:
    """The same uniform number through the same distribution."""
    arguments = make(200, 60)
    generators = [torch.Generator().manual_seed(row) for row in range(200)]
    arguments["uniforms_R"] = torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in generators])
    params = SamplingParams(temperature=0.8, top_p=0.9)
    arguments["top_p_R"] = torch.full((200,), 0.9)
    tokens, _ = sample(**arguments)
    for row, logits_V in enumerate(arguments["logits_RV"]):
        expected = plain.draw(plain.filter_logits(logits_V, params), torch.Generator().manual_seed(row))
        assert int(tokens[row]) == expected


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS[:5])
def test_draws_follow_the_distribution(top_k: int, top_p: float, min_p: float) -> None:
    """Chi-square of 40,000 draws against the exact filtered distribution, at most 3 sigma above its mean."""
    draws, size = 40_000, 30
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ones = torch.ones(draws)
    tokens, _ = sample(
        logits_V.float().expand(draws, size),
        torch.rand(draws, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
        temperature_R=0.9 * ones,
        top_k_R=torch.full((draws,), top_k, dtype=torch.int32),
        top_p_R=top_p * ones,
        min_p_R=min_p * ones,
    )
    params = SamplingParams(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = draws * plain.filter_logits(logits_V, params).softmax(-1)
    found = torch.bincount(tokens, minlength=size).double()
    kept = expected > 0
    assert not found[~kept].any()
    freedom = int(kept.sum()) - 1
    chi_square = float(((found - expected)[kept].square() / expected[kept]).sum())
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


def test_log_probabilities_are_those_of_the_logits_as_given() -> None:
    arguments = make()
    tokens, log_probs = sample(**arguments)
    expected = arguments["logits_RV"].double().log_softmax(1)[torch.arange(4), tokens]
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    arguments = make(16, top_p_R=torch.full((16,), 0.9), temperature_R=torch.linspace(0, 2, 16))
    tokens, log_probs = sample(**arguments)
    for row in range(16):
        one = sample(**{name: x[row : row + 1] for name, x in arguments.items()})
        assert torch.equal(one[0], tokens[row : row + 1])
        assert torch.equal(one[1], log_probs[row : row + 1])


def test_masks_count_bits_from_the_lowest() -> None:
    words = torch.tensor([[0, 1 << 3], [-(2**31), 0], [5, 0], [0, 0]], dtype=torch.int32)
    arguments = make(allowed_RW=words, temperature_R=torch.zeros(4))
    tokens, log_probs = sample(**arguments)
    expected_third = 0 if arguments["logits_RV"][2, 0] >= arguments["logits_RV"][2, 2] else 2
    assert tokens.tolist() == [35, 31, expected_third, -1]
    assert log_probs.isnan().tolist() == [False, False, False, True]


def lists(**changes: Any) -> dict[str, Any]:
    return {
        "starts": torch.tensor([0, 2, 3, 3, 3], dtype=torch.int32),
        "tokens_M": torch.tensor([4, 9, 4], dtype=torch.int32),
    } | changes


def test_penalties_are_those_of_the_plain_sampler() -> None:
    logits_RV = make()["logits_RV"]
    found = logits_RV.clone()
    ones = torch.ones(4)
    counts = torch.tensor([2, 0, 1], dtype=torch.int32)
    penalize(found, **lists(counts_M=counts, repetition_R=1.5 * ones, presence_R=0.5 * ones, frequency_R=0.25 * ones))
    for row, (prompt, output) in enumerate([([9], [4, 4]), ([], [4]), ([], []), ([], [])]):
        params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, temperature=0)
        sampler = plain.Sampler(params, prompt_ids=prompt, vocab_size=50, seed=0)
        for token in output:  # a row of logits that makes it choose the token
            sampler.next_token(torch.nn.functional.one_hot(torch.tensor(token), 50).float() * 1e6)
        torch.testing.assert_close(found[row], sampler.penalized(logits_RV[row]), rtol=1e-6, atol=1e-6)


def test_biases_are_added() -> None:
    logits_RV = make()["logits_RV"]
    found = logits_RV.clone()
    add_bias(found, **lists(biases_M=torch.tensor([1.0, float("-inf"), -2.0])))
    expected = logits_RV.clone()
    expected[0, 4] += 1
    expected[0, 9] = float("-inf")
    expected[1, 4] -= 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_RV": torch.ones(4)}, r"logits are torch.float32 \(4,\); expected floating point \[R, V\]"),
        ({"logits_RV": torch.ones(4, 50).long()}, "logits are torch.int64"),
        ({"uniforms_R": torch.rand(4)}, r"uniforms_R is torch.float32 \(4,\); expected contiguous float64 \(4,\)"),
        ({"top_k_R": torch.zeros(4, dtype=torch.int64)}, "top_k_R is torch.int64"),
        ({"top_p_R": torch.ones(3)}, r"top_p_R is torch.float32 \(3,\)"),
        ({"min_p_R": torch.zeros(8)[::2]}, "min_p_R is .*; expected contiguous float32"),
        (
            {"allowed_RW": torch.zeros(4, 1, dtype=torch.int32)},
            r"allowed is torch.int32 \(4, 1\); expected",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**make(**changes))


def test_lists_that_do_not_fit_are_refused() -> None:
    logits: Tensor = make()["logits_RV"]
    with pytest.raises(ValueError, match=r"starts is torch.int64 \(5,\); expected contiguous int32 \(5,\)"):
        add_bias(logits, **lists(starts=torch.zeros(5, dtype=torch.int64), biases_M=torch.ones(3)))
    with pytest.raises(ValueError, match=r"biases_M is torch.float32 \(2,\); expected contiguous float32 \(3,\)"):
        add_bias(logits, **lists(biases_M=torch.ones(2)))
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        add_bias(logits.double(), **lists(biases_M=torch.ones(3)))


@pytest.mark.parametrize("target", COMPILED)
def test_blocks_are_powers_of_two_and_no_larger_than_the_vocabulary_needs(target: str) -> None:
    for size in (1, 1000, 262144):
        for tunable in (SAMPLE, SAMPLE_ROW):
            for config in tunable.choices({"V": size}, torch.float32, COMPILED[target]):
                assert all(block & (block - 1) == 0 for block in config.blocks.values())
        assert SAMPLE.pick(torch.float32, COMPILED[target], V=size).blocks["BLOCK"] < 2 * size
        assert SAMPLE_ROW.pick(torch.float32, COMPILED[target], V=size).blocks["CAPACITY"] < 2 * size
