"""HQQ against its steps group by group in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.model.quantized.tensor import to_groups
from trine.engine.quantize import hqq, rtn
from trine.engine.quantize.hqq import BETA, GROWTH, NORM, STEPS, misfit, quantize_hqq, shrink
from trine.engine.quantize.rtn import find_parameters, quantize_rtn

CASES: dict[str, Scheme] = {
    "w4a16-32": make_scheme("w4a16", group_size="32"),
    "w4a16-32-asymmetric": make_scheme("w4a16", group_size="32", symmetric=False),
    "w4a16-channel": make_scheme("w4a16", group_size="channel"),
    "w8a8": SCHEMES["w8a8"],
}


@pytest.fixture
def weight() -> Tensor:
    """[6, 64] in float64, with outliers."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 64, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(6, 64, generator=generator) < 0.05, 4 * w, w)


def _lost(w: Tensor, kept: Tensor) -> float:
    return float((w - kept).abs().pow(NORM).sum())


def _brute_force(w: Tensor, scheme: Scheme, scale: float, zero: float) -> list[float]:
    """What is left of one group by the codes with the least error on the way from these parameters on."""
    a, b = scheme.limits
    unit, least, best = scale, float("inf"), list[float]()
    for step in range(STEPS + 1):
        codes = [min(b, max(a, round(x / scale + zero))) for x in w.tolist()]
        kept = [scale * (code - zero) for code in codes]
        lost = sum(abs(x - y) ** NORM for x, y in zip(w.tolist(), kept, strict=True))
        if lost < least:
            least, best = lost, [code - zero for code in codes]
        beta, wanted = BETA * GROWTH**step, []
        for x, y in zip(w.tolist(), kept, strict=True):
            rest = (x - y) / unit
            size = max(0.0, abs(rest) - NORM / beta * max(abs(rest), 1e-12) ** (NORM - 1))
            wanted.append(x - unit * (size if rest > 0 else -size))
        if not scheme.symmetric:
            mean = sum(code - x / scale for code, x in zip(codes, wanted, strict=True)) / len(codes)
            zero = min(b, max(a, round(mean)))
        steps = [code - zero for code in codes]
        fitted = sum(x * step for x, step in zip(wanted, steps, strict=True)) / sum(step * step for step in steps)
        scale = fitted if fitted > 0 else scale
    whole, left = sum(x * x for x in w.tolist()), sum(x * step for x, step in zip(w.tolist(), best, strict=True))
    return [whole / left * step for step in best]


@pytest.mark.parametrize("name", list(CASES))
def test_codes_are_those_with_the_least_error_on_the_way(name: str, weight: Tensor) -> None:
    """And their scale the one that leaves a group as large as it was."""
    scheme = CASES[name]
    groups = to_groups(weight, scheme)
    scales, zeros = find_parameters(groups, scheme, torch.float64, lambda a, b: (a * b).sum(-1))
    found = to_groups(quantize_hqq(weight, scheme).dequantize(torch.float64), scheme).flatten(0, 1)
    parameters = zip(scales.flatten().tolist(), zeros.flatten().tolist(), strict=True)
    for w, kept, (scale, zero) in zip(groups.flatten(0, 1), found, parameters, strict=True):
        assert kept.tolist() == pytest.approx(_brute_force(w, scheme, scale, zero), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", list(CASES))
def test_error_is_below_that_of_the_search_over_squares(
    name: str, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scales that either finds its codes by."""
    scheme = CASES[name]
    for module in (hqq, rtn):
        monkeypatch.setattr(module, "without_shrinking", lambda groups, codes, scales, *_: scales)
    found, start = quantize_hqq(weight, scheme), quantize_rtn(weight, scheme, search="weights")
    assert _lost(weight, found.dequantize(torch.float64)) < 0.995 * _lost(weight, start.dequantize(torch.float64))


def test_shrinking_gives_up_small_numbers_and_keeps_large_ones() -> None:
    x = torch.tensor([-5.0, -0.05, 0.0, 0.05, 5.0], dtype=torch.float64)
    moved = shrink(x, BETA)
    assert moved[1:4].tolist() == [0, 0, 0]
    assert float(moved[4]) == pytest.approx(5 - 0.07 * 5**-0.3)
    assert float(moved[0]) == -float(moved[4])


def test_scales_are_kept_in_their_dtype_and_groups_of_zeros_stay_zero() -> None:
    w_NK = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    w_NK[1] = 0
    found = quantize_hqq(w_NK, CASES["w4a16-32"], scale_dtype=torch.bfloat16)
    assert found.scales.dtype == torch.bfloat16
    exact, kept = (to_groups(one, CASES["w4a16-32"]) for one in (w_NK, found.dequantize(torch.float32)))
    torch.testing.assert_close((exact * kept).sum(-1), exact.square().sum(-1), rtol=2**-8, atol=0)
    assert torch.equal(found.dequantize(torch.float32)[1], torch.zeros(64))


def test_only_integer_codes_fit() -> None:
    assert misfit(SCHEMES["w4a16"]) is None
    assert "rtn-mse" in str(misfit(SCHEMES["fp8"]))
