"""Sampling on a GPU with real vocabularies: the tokens that sorting in float64 gives, and the distribution of draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trine.kernels.sampling.op import sample, sample_reference

V = 128256
# temperature, top-k, top-p, min-p
KINDS = (
    (0.0, 5, 0.5, 0.1),
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.9, 200, 0.8, 0.001),
)


def make(count: int, dtype: torch.dtype, size: int = V) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    values = list(zip(*(KINDS[row % len(KINDS)] for row in range(count)), strict=True))
    temperature, _, top_p, min_p = (torch.tensor(x, dtype=torch.float32, device="cuda") for x in values)
    return {
        "logits_RV": (3 * torch.randn(count, size, device="cuda", generator=generator)).to(dtype),
        "uniforms_R": torch.rand(count, device="cuda", generator=generator, dtype=torch.float64),
        "temperature_R": temperature,
        "top_k_R": torch.tensor(values[1], dtype=torch.int32, device="cuda"),
        "top_p_R": top_p,
        "min_p_R": min_p,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 6, 120])
def test_the_same_tokens_as_by_sorting(count: int, dtype: torch.dtype) -> None:
    arguments = make(count, dtype)
    tokens, log_probs = sample(**arguments)
    expected, expected_log_probs = sample_reference(**arguments | {"logits_RV": arguments["logits_RV"].double()})
    # fp32 sums over the vocabulary move a border between tokens by about 1e-6: a draw in a thousand may fall between.
    assert int((tokens != expected).sum()) <= (1 if count > 6 else 0)
    same = tokens == expected
    torch.testing.assert_close(log_probs[same], expected_log_probs[same], rtol=0, atol=1e-4)


def test_draws_follow_the_distribution_and_repeat() -> None:
    draws, size = 200_000, 50
    arguments = {
        name: x[5:6].expand(draws, *x.shape[1:]).contiguous() for name, x in make(6, torch.float32, size).items()
    }
    arguments["logits_RV"] /= 4  # so that many tokens share the probability
    generator = torch.Generator("cuda").manual_seed(1)
    arguments["uniforms_R"] = torch.rand(draws, device="cuda", generator=generator, dtype=torch.float64)
    arguments["top_k_R"].fill_(20)
    tokens, _ = sample(**arguments)
    assert torch.equal(sample(**arguments)[0], tokens)
    scaled = arguments["logits_RV"][0].double() / 0.9
    order = scaled.argsort(descending=True)[:20]
    probabilities = scaled[order].softmax(0)
    kept = order[probabilities.cumsum(0) - probabilities < 0.8]
    weights = (scaled[kept] - scaled.max()).exp()
    weights = torch.where(weights >= 0.001, weights, 0.0)
    expected = draws * weights / weights.sum()
    found = torch.bincount(tokens, minlength=size)[kept].double()
    assert int(found.sum()) == draws
    possible = expected > 0
    freedom = int(possible.sum()) - 1
    assert freedom >= 5
    chi_square = float(((found - expected)[possible].square() / expected[possible]).sum())
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


def test_rows_that_are_not_numbers_give_no_token() -> None:
    arguments = make(6, torch.float32)
    arguments["logits_RV"][1, 70000] = float("nan")
    arguments["logits_RV"][2] = float("-inf")
    tokens, log_probs = sample(**arguments)
    assert (tokens >= 0).tolist() == [True, False, False, True, True, True]
    assert log_probs.isnan().tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize(("spread", "top_k", "top_p"), [(0.1, 0, 0.999), (3.0, 20_000, 0.95), (3.0, 4096, 1.0)])
def test_rows_with_more_candidates_than_fit(spread: float, top_k: int, top_p: float) -> None:
    arguments = make(6, torch.float32)
    arguments["logits_RV"] *= spread / 3
    arguments["temperature_R"].fill_(1.0)
    arguments["top_k_R"].fill_(top_k)
    arguments["top_p_R"].fill_(top_p)
    tokens, _ = sample(**arguments)
    expected, _ = sample_reference(**arguments | {"logits_RV": arguments["logits_RV"].double()})
    assert int((tokens != expected).sum()) <= 1


def test_a_graph_replays_with_other_parameters() -> None:
    """The launches are the same for all rows, whatever their parameters are."""
    arguments = make(6, torch.float32)
    sample(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, log_probs = sample(**arguments)
    for shift in (0, 1):
        for name in ("temperature_R", "top_k_R", "top_p_R", "min_p_R", "uniforms_R"):
            arguments[name].copy_(arguments[name].roll(shift))
        graph.replay()
        expected, expected_log_probs = sample(**arguments)
        assert torch.equal(tokens, expected)
        assert torch.equal(log_probs, expected_log_probs)


def test_offsets_past_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    size = 262144
    count = 2**31 // size + 4
    arguments = make(count, torch.bfloat16, 64)
    logits = torch.zeros(count, size, dtype=torch.bfloat16, device="cuda")
    logits[-4:, 250_000:250_004] = torch.tensor([50.0, 10.0, 0.0, 0.0], device="cuda")
    tokens, _ = sample(**arguments | {"logits_RV": logits})
    assert tokens[-4:].tolist() == [250_000] * 4
