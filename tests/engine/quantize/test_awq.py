"""AWQ's scales and clipping against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.quantize.awq import GRID, awq_scales, misfit
from trine.engine.quantize.rtn import RANGES, quantize_rtn
from trine.engine.quantize.statistics import InputStatistics

CASES: dict[str, Scheme] = {
    "w4a16-32": make_scheme("w4a16", group_size="32"),
    "w4a16-32-asymmetric": make_scheme("w4a16", group_size="32", symmetric=False),
    "w4a16-channel": make_scheme("w4a16", group_size="channel"),
    "w8a16": SCHEMES["w8a16"],
}
TOKENS, WIDTH = 200, 64


@pytest.fixture
def inputs() -> Tensor:
    """[200, 64] in float64; some inputs are ten times the others."""
    generator = torch.Generator().manual_seed(1)
    x_XK = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    x_XK[:, ::9] *= 10
    return x_XK


@pytest.fixture
def weights() -> list[Tensor]:
    """Of two layers on these inputs."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_features, WIDTH, generator=generator, dtype=torch.float64) for num_features in (12, 5)]


def _loss(s_K: Tensor, weights: list[Tensor], scheme: Scheme, x_XK: Tensor) -> float:
    """Of the outputs, as the layers would compute them from inputs divided by s."""
    lost = 0.0
    for w_NK in weights:
        kept_NK = quantize_rtn(w_NK * s_K, scheme).dequantize(torch.float64)
        lost += float(((x_XK / s_K) @ kept_NK.T - x_XK @ w_NK.T).square().sum())
    return lost


def _grid(weights: list[Tensor], scheme: Scheme, x_XK: Tensor) -> list[Tensor]:
    """The candidates by the formula, input by input."""
    size = scheme.group_size or WIDTH
    rows = [row.tolist() for w_NK in weights for row in w_NK]
    found = [torch.ones(WIDTH, dtype=torch.float64)]
    for both in (True, False):
        for i in range(0 if both else 1, GRID):
            r, s = i / GRID, []
            for k in range(WIDTH):
                group = slice(k // size * size, k // size * size + size)
                of_weights = sum(abs(row[k]) / max(map(abs, row[group])) for row in rows) / len(rows)
                of_inputs = float(x_XK[:, k].abs().mean())
                s.append(of_inputs**r / (of_weights ** (1 - r) + 1e-4) if both else of_inputs**r)
            middle = (max(s) * min(s)) ** 0.5
            found.append(torch.tensor([one / middle for one in s], dtype=torch.float64))
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_scales_are_those_of_the_grid_with_the_least_error(name: str, weights: list[Tensor], inputs: Tensor) -> None:
    scheme = CASES[name]
    found = awq_scales(weights, scheme, InputStatistics.of(inputs), lambda s_K: s_K)
    grid = _grid(weights, scheme, inputs)
    losses = [_loss(s_K, weights, scheme, inputs) for s_K in grid]
    near = [loss for s_K, loss in zip(grid, losses, strict=True) if torch.allclose(s_K, found, rtol=1e-9, atol=0)]
    # The largest number of a group lies halfway between two codes, so the last bit of s changes a loss a little.
    assert min(near) <= 1.01 * min(losses)
    assert min(losses) < 0.9 * losses[0]


def test_scales_that_must_be_equal_are(weights: list[Tensor], inputs: Tensor) -> None:
    def tie(s_K: Tensor) -> Tensor:
        return s_K.view(-1, 2).log().mean(1, keepdim=True).exp().expand(-1, 2).reshape(-1)

    found = awq_scales(weights, CASES["w4a16-32"], InputStatistics.of(inputs), tie)
    assert torch.equal(found[::2], found[1::2])
    assert float(found.max()) > float(found.min())


def test_inputs_that_are_always_zero_do_no_harm(weights: list[Tensor], inputs: Tensor) -> None:
    inputs[:, 3] = 0
    found = awq_scales(weights, CASES["w4a16-32"], InputStatistics.of(inputs), lambda s_K: s_K)
    assert bool((found > 0).all())
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", list(CASES))
def test_clipping_keeps_the_range_with_the_least_error_of_the_outputs(
    name: str, weights: list[Tensor], inputs: Tensor
) -> None:
    """And then gives its codes the scale with which outputs are no smaller than they were."""
    scheme, w_NK = CASES[name], weights[0]
    size = scheme.group_size or WIDTH
    found = quantize_rtn(w_NK, scheme, InputStatistics.of(inputs), search="outputs").dequantize(torch.float64)
    a, b = scheme.limits
    for n in range(len(w_NK)):
        for start in range(0, WIDTH, size):
            w, x = w_NK[n, start : start + size], inputs[:, start : start + size]
            low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
            ways = []
            for part in (1.0, *RANGES):
                scale = part * (max(-low, high) / ((b - a) / 2) if scheme.symmetric else (high - low) / (b - a))
                zero = 0.0 if scheme.symmetric else round(min(b, max(a, a - part * low / scale)))
                kept = ((w / scale + zero).clamp(a, b).round() - zero) * scale
                ways.append((float((x @ (kept - w)).square().sum()), kept))
            _, kept = min(ways, key=lambda way: way[0])
            kept = kept * float((x @ w).square().sum() / (x @ w).dot(x @ kept))
            torch.testing.assert_close(found[n, start : start + size], kept, rtol=1e-9, atol=1e-9)


def test_only_integer_weights_fit() -> None:
    assert misfit(SCHEMES["w4a16"]) is None
    assert "smoothquant" in str(misfit(SCHEMES["w8a8"]))
    assert misfit(SCHEMES["fp8"])
