"""SmoothQuant's scales against its formula and against every strength tried by hand, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import SCHEMES
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.smoothquant import ALPHAS, misfit, smooth_scales
from trine.engine.quantize.statistics import InputStatistics

WIDTH = 128


@pytest.fixture
def inputs() -> Tensor:
    """[100, 128] in float64; a few inputs are fifty times the others."""
    generator = torch.Generator().manual_seed(1)
    x_XK = torch.randn(100, WIDTH, generator=generator, dtype=torch.float64)
    x_XK[:, ::40] *= 50
    return x_XK


@pytest.fixture
def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_features, WIDTH, generator=generator, dtype=torch.float64) for num_features in (12, 5)]


def _formula(weights: list[Tensor], x_XK: Tensor, alpha: float) -> Tensor:
    s = []
    for k in range(WIDTH):
        of_inputs = max(abs(x) for x in x_XK[:, k].tolist())
        of_weights = max(abs(w) for w_NK in weights for w in w_NK[:, k].tolist())
        s.append(of_inputs**alpha / of_weights ** (1 - alpha))
    return torch.tensor(s, dtype=torch.float64)


def _rounded(x_XK: Tensor, name: str) -> Tensor:
    """Activations with a scale for each token (each 128 numbers, which is the same here)."""
    limit = 127.0 if name == "w8a8" else 448.0
    scales = x_XK.abs().amax(1, keepdim=True) / limit
    codes = x_XK / scales
    return (codes.round() if name == "w8a8" else codes.float().to(torch.float8_e4m3fn).double()) * scales


def _loss(s_K: Tensor, weights: list[Tensor], x_XK: Tensor, name: str) -> float:
    lost = 0.0
    for w_NK in weights:
        kept_NK = quantize_rtn(w_NK * s_K, SCHEMES[name]).dequantize(torch.float64)
        lost += float((_rounded(x_XK / s_K, name) @ kept_NK.T - x_XK @ w_NK.T).square().sum())
    return lost


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_a_given_strength_is_the_formula(alpha: float, weights: list[Tensor], inputs: Tensor) -> None:
    found = smooth_scales(weights, SCHEMES["w8a8"], InputStatistics.of(inputs), lambda s_K: s_K, alpha=alpha)
    torch.testing.assert_close(found, _formula(weights, inputs, alpha), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_the_search_takes_the_strength_with_the_least_error(name: str, weights: list[Tensor], inputs: Tensor) -> None:
    found = smooth_scales(weights, SCHEMES[name], InputStatistics.of(inputs), lambda s_K: s_K)
    ones = torch.ones(WIDTH, dtype=torch.float64)
    losses = [_loss(s_K, weights, inputs, name) for s_K in (ones, *(_formula(weights, inputs, a) for a in ALPHAS))]
    assert _loss(found, weights, inputs, name) == pytest.approx(min(losses), rel=1e-4)
    if name == "w8a8":
        assert min(losses) < 0.3 * losses[0]


def test_inputs_that_are_always_zero_or_read_by_nothing_stay(weights: list[Tensor], inputs: Tensor) -> None:
    inputs[:, 3] = 0
    for w_NK in weights:
        w_NK[:, 7] = 0
    found = smooth_scales(weights, SCHEMES["w8a8"], InputStatistics.of(inputs), lambda s_K: s_K, alpha=0.5)
    assert found[[3, 7]].tolist() == [1.0, 1.0]
    assert bool((found > 0).all())


def test_only_schemes_that_round_activations_fit() -> None:
    assert misfit(SCHEMES["w8a8"]) is misfit(SCHEMES["fp8"]) is misfit(SCHEMES["fp8-block"]) is None
    assert "awq" in str(misfit(SCHEMES["w4a16"]))
