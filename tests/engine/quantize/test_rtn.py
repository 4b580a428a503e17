"""Round to nearest against a loop in float64 that tries every range of every group."""

from __future__ import annotations

import math

import pytest
import torch

from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.model.quantized.tensor import to_groups
from trine.engine.quantize.rtn import RANGES, quantize_rtn

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


def _error(group: list[float], scale: float, zero: float, codes: list[float]) -> float:
    return sum((scale * (code - zero) - w) ** 2 for code, w in zip(codes, group, strict=True))


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


@pytest.mark.parametrize("name", list(CASES))
def test_search_keeps_the_range_with_the_least_error(name: str, weight: torch.Tensor) -> None:
    scheme = CASES[name]
    quantized = quantize_rtn(weight, scheme, search="weights")
    restored = _groups(quantized.dequantize(torch.float64), scheme)
    least = 0.0
    for group, values in zip(_groups(weight, scheme), restored, strict=True):
        best = min(_error(group, *_brute_force(group, scheme, part)) for part in RANGES)
        found = sum((value - w) ** 2 for value, w in zip(values, group, strict=True))
        assert found == pytest.approx(best, rel=1e-9)
        least += best
    plain = quantize_rtn(weight, scheme).dequantize(torch.float64)
    before = float((plain - weight).square().sum())
    assert least <= before * (1 + 1e-12)
    if scheme.bits == 4:
        assert least < 0.99 * before


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
