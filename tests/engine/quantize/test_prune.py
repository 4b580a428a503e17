"""Pruning against sorting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.quantize.prune import Sparsity, parse_sparsity, prune
from trine.engine.quantize.statistics import InputStatistics


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, 24, generator=generator) * torch.rand(24, generator=generator).mul(4).exp()


def _without_least(scores: list[float], values: list[float], count: int) -> list[float]:
    gone = sorted(range(len(scores)), key=lambda i: scores[i])[:count]
    return [0.0 if i in gone else value for i, value in enumerate(values)]


def test_magnitude_takes_the_least_of_the_whole_weight(weight: Tensor) -> None:
    values = weight.flatten().tolist()
    expected = _without_least([abs(w) for w in values], values, round(0.3 * 144))
    assert prune(weight, parse_sparsity("0.3")).flatten().tolist() == expected


def test_wanda_takes_the_least_products_of_each_row(weight: Tensor, inputs: Tensor) -> None:
    found = prune(weight, parse_sparsity("0.5"), InputStatistics.of(inputs))
    norms = inputs.double().square().sum(0).sqrt().tolist()
    for row, kept in zip(weight.tolist(), found.tolist(), strict=True):
        assert kept == _without_least([abs(w) * x for w, x in zip(row, norms, strict=True)], row, 12)


@pytest.mark.parametrize("by_inputs", [False, True])
@pytest.mark.parametrize(("text", "kept", "block"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:3", 1, 3)])
def test_of_every_block_so_many_stay(
    text: str, kept: int, block: int, by_inputs: bool, weight: Tensor, inputs: Tensor
) -> None:
    norms = inputs.double().square().sum(0).sqrt().tolist() if by_inputs else [1.0] * 24
    found = prune(weight, parse_sparsity(text), InputStatistics.of(inputs) if by_inputs else None)
    for row, left in zip(weight.tolist(), found.tolist(), strict=True):
        for start in range(0, 24, block):
            part = slice(start, start + block)
            scores = [abs(w) * x for w, x in zip(row[part], norms[part], strict=True)]
            assert left[part] == _without_least(scores, row[part], block - kept)


def test_looking_at_inputs_loses_less_of_the_output(weight: Tensor, inputs: Tensor) -> None:
    def lost(statistics: InputStatistics | None) -> float:
        return float((inputs @ (prune(weight, parse_sparsity("0.5"), statistics) - weight).T).square().sum())

    assert lost(InputStatistics.of(inputs)) < 0.5 * lost(None)


def test_equal_weights_and_inputs_that_are_always_zero_still_give_the_share() -> None:
    ones, statistics = torch.ones(4, 8, dtype=torch.bfloat16), InputStatistics.of(torch.zeros(3, 8))
    for found in (prune(ones, Sparsity(0.25)), prune(ones, Sparsity(0.25), statistics)):
        assert (found.dtype, int((found == 0).sum())) == (torch.bfloat16, 8)


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.5", "4:4", "0:4", "5:4", "half", "2/4", "", "nan", "0.0"])
def test_what_is_no_sparsity_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--sparsity"):
        parse_sparsity(text)


def test_blocks_must_fill_a_row() -> None:
    parse_sparsity("2:4").check_shape("layer", 24)
    parse_sparsity("0.5").check_shape("layer", 25)
    with pytest.raises(UsageError, match="layer has 26 inputs"):
        parse_sparsity("2:4").check_shape("layer", 26)
