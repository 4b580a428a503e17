"""Round to nearest against a loop in float64 that tries every range of every group."""

from __future__ import annotations

import math

import pytest
import torch

from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.model.quantized.tensor import to_groups
from trine.engine.quantize.rtn import RANGES, Search, quantize_rtn
from trine.engine.quantize.statistics import InputStatistics

CASES: dict[str, Scheme] = {
    "w4a16-32": make_scheme("w4a16", group_size="32"),
    "w4a16-32-asymmetric": make_scheme("w4a16", group_size="32", symmetric=False),
    "w8a8": SCHEMES["w8a8"],
    "fp8": SCHEMES["fp8"],
    "fp8-block": SCHEMES["fp8-block"],
}


def _e4m3(x: float) -> float:
    """x rounded to 3 bits behind the leading one, exponents from -6 on; ties to even."""
    exponent = max(-6, math.floor(math.log2(abs(x)))) if x else -6
    step = 2.0 ** (exponent - 3)
    return round(x / step) * step


def _brute_force(group: list[float], scheme: Scheme, part: float) -> tuple[float, float, list[float]]:
    """(scale, zero, codes) of one group by the formulas, number by number."""
    a, b = scheme.limits
    low, high = part * min(0.0, *group), part * max(0.0, *group)
    scale = max(-low, high) / ((b - a) / 2) if scheme.symmetric else (high - low) / (b - a)
    zero = 0.0 if scheme.symmetric else round(min(b, max(a, a - low / scale)))
    codes = [min(b, max(a, w / scale + zero)) for w in group]
    return scale, zero, [_e4m3(code) if scheme.kind == "float" else round(code) for code in codes]


def _error(group: list[float], weights: list[float], scale: float, zero: float, codes: list[float]) -> float:
    return sum(h * (scale * (code - zero) - w) ** 2 for h, code, w in zip(weights, codes, group, strict=True))


def _search(group: list[float], weights: list[float], scheme: Scheme) -> list[float]:
    """What is left of a group by the range with the least weighted error, with the scale that makes it no smaller."""
    ways = [_brute_force(group, scheme, part) for part in (1.0, *RANGES)]
    _, zero, codes = min(ways, key=lambda way: _error(group, weights, *way))
    whole = sum(h * w * w for h, w in zip(weights, group, strict=True))
    kept = sum(h * w * (code - zero) for h, w, code in zip(weights, group, codes, strict=True))
    return [whole / kept * (code - zero) for code in codes]


def _groups(w_NK: torch.Tensor, scheme: Scheme) -> list[list[float]]:
    return [group.tolist() for group in to_groups(w_NK, scheme).flatten(0, 1)]


@pytest.fixture
def weight() -> torch.Tensor:
    """[6, 64] in float64, with outliers, so that cutting them off pays."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(6, 64, generator=generator) < 0.03, 4 * w, w)


@pytest.mark.parametrize("name", list(CASES))
def test_min_max_is_the_formula(name: str, weight: torch.Tensor) -> None:
    scheme = CASES[name]
    quantized = quantize_rtn(weight, scheme)
    codes = _groups(quantized.codes_NK.double(), scheme)
    zeros = torch.zeros_like(quantized.scales) if quantized.zeros_NG is None else quantized.zeros_NG
    found = zip(codes, quantized.scales.flatten().tolist(), zeros.flatten().tolist(), strict=True)
    for group, (group_codes, scale, zero) in zip(_groups(weight, scheme), found, strict=True):
        expected = _brute_force(group, scheme, 1.0)
        assert scale == pytest.approx(expected[0], rel=1e-14)
        assert (zero, group_codes) == (expected[1], expected[2])


@pytest.mark.parametrize("search", ["weights", "inputs"])
@pytest.mark.parametrize("name", list(CASES))
def test_search_keeps_the_range_with_the_least_error(name: str, search: Search, weight: torch.Tensor) -> None:
    scheme = CASES[name]
    x_XK = torch.randn(50, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_XK[:, ::7] *= 5
    quantized = quantize_rtn(weight, scheme, InputStatistics.of(x_XK), search=search)
    mean_K = x_XK.square().mean(0) if search == "inputs" else torch.ones(64, dtype=torch.float64)
    weights = _groups(mean_K.expand(6, 64), scheme)
    found = _groups(quantized.dequantize(torch.float64), scheme)
    for group, each, values in zip(_groups(weight, scheme), weights, found, strict=True):
        assert values == pytest.approx(_search(group, each, scheme), rel=1e-9, abs=1e-12)
    plain = quantize_rtn(weight, scheme).dequantize(torch.float64)
    errors = [float(((kept - weight).square() * mean_K).sum()) for kept in (quantized.dequantize(torch.float64), plain)]
    assert errors[0] < (0.97 if scheme.bits == 4 else 1.001) * errors[1]


@pytest.mark.parametrize("name", list(CASES))
def test_a_search_makes_outputs_no_smaller(name: str, weight: torch.Tensor) -> None:
    """In each group, exactly; the scales of the least error leave 1 to 3 % less of 4-bit weights."""
    scheme = CASES[name]
    kept = quantize_rtn(weight, scheme, search="weights").dequantize(torch.float64)
    exact, found = to_groups(weight, scheme), to_groups(kept, scheme)
    torch.testing.assert_close((exact * found).sum(-1), exact.square().sum(-1), rtol=1e-12, atol=1e-12)


def test_a_range_beyond_the_largest_number_is_found() -> None:
    """7.5 steps to the largest number, if it is positive, leave half a step of it; 7.03 leave nothing."""
    w_NK = torch.arange(8, dtype=torch.float64).repeat(1, 4)
    found = quantize_rtn(w_NK, CASES["w4a16-32"], search="weights").dequantize(torch.float64)
    torch.testing.assert_close(found, w_NK, rtol=0.01, atol=0.03)


def test_scales_are_rounded_before_they_are_used() -> None:
    w_NK = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    scheme = SCHEMES["w4a16"]
    quantized = quantize_rtn(w_NK, scheme, scale_dtype=torch.bfloat16)
    assert quantized.scales.dtype == torch.bfloat16
    nearest = (w_NK / quantized.scales.float()).round().clamp(-8, 7)
    assert torch.equal(quantized.codes_NK.float(), nearest)


def test_groups_of_zeros_stay_zero() -> None:
    for name, scheme in CASES.items():
        restored = quantize_rtn(torch.zeros(4, 64, dtype=torch.bfloat16), scheme, search="weights").dequantize(
            torch.float32
        )
        assert torch.equal(restored, torch.zeros(4, 64)), name
