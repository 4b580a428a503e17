"""GPTQ against the plain form of its method in float64: a fresh inverse for the columns left after each one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import BLOCK, SCHEMES, Scheme, make_scheme
from trine.engine.model.quantized.tensor import QuantizedTensor, to_groups
from trine.engine.quantize.gptq import DAMPING, HessianError, inverse_factor, quantize_gptq
from trine.engine.quantize.rtn import find_parameters, product_of, quantize_rtn, quantized_tensor
from trine.engine.quantize.statistics import InputStatistics

CASES: dict[str, Scheme] = {
    "w4a16-32": make_scheme("w4a16", group_size="32"),
    "w4a16-32-asymmetric": make_scheme("w4a16", group_size="32", symmetric=False),
    "w4a16-channel": make_scheme("w4a16", group_size="channel"),
    "w8a8": SCHEMES["w8a8"],
    "fp8": SCHEMES["fp8"],
    "fp8-block": SCHEMES["fp8-block"],
}


def _inputs(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, and dependent on each other."""
    generator = torch.Generator().manual_seed(1)
    x_XK = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x_XK = x_XK * torch.rand(width, generator=generator, dtype=torch.float64).mul(3).exp()
    return (x_XK + 0.7 * x_XK.roll(1, 1) + 0.3).to(dtype)


def _weight(num_features: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_features, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def _output_error(quantized: QuantizedTensor, w_NK: Tensor, x_XK: Tensor) -> float:
    return float((x_XK @ (quantized.dequantize(w_NK.dtype) - w_NK).T).square().sum())


def _brute_force(w_NK: Tensor, scheme: Scheme, hessian_KK: Tensor) -> Tensor:
    """Codes, by optimal brain surgery on one column after the other, with the parameters of round to nearest."""
    nearest = quantize_rtn(w_NK, scheme)
    num_features, width = w_NK.shape
    size = BLOCK if scheme.strategy == "block" else scheme.group_size or width
    scales, zeros = nearest.scales, nearest.zeros_NG
    if scheme.strategy == "block":
        scales = scales.repeat_interleave(BLOCK, 0)[:num_features]
    damped_KK = hessian_KK + DAMPING[0] * hessian_KK.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    w_NK, left = w_NK.clone(), sorted(range(width), key=lambda k: -float(hessian_KK[k, k]))
    codes_NK = torch.empty_like(w_NK)
    while left:
        inverse = torch.linalg.inv(damped_KK[left][:, left])
        k = left[0]
        scale, zero = scales[:, k // size], 0.0 if zeros is None else zeros[:, k // size].double()
        code = (w_NK[:, k] / scale + zero).clamp(*scheme.limits)
        code = code.round() if scheme.kind == "int" else code.to(torch.float8_e4m3fn).double()
        codes_NK[:, k] = code
        error_N = (w_NK[:, k] - (code - zero) * scale) / inverse[0, 0]
        w_NK[:, left] -= error_N[:, None] * inverse[0]
        left = left[1:]
    return codes_NK


@pytest.mark.parametrize("name", list(CASES))
def test_codes_are_those_of_optimal_brain_surgery_column_by_column(name: str) -> None:
    scheme, width = CASES[name], 160
    w_NK, x_XK = _weight(9, width, torch.float64), _inputs(400, width, torch.float64)
    statistics = InputStatistics.of(x_XK)
    found = quantize_gptq(w_NK, scheme, statistics, search=None)
    expected = _brute_force(w_NK, scheme, 2 / 400 * x_XK.T @ x_XK)
    assert torch.equal(found.codes_NK.double(), expected)
    assert torch.equal(found.scales, quantize_rtn(w_NK, scheme).scales)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_nearer_than_those_of_rounding(name: str, dtype: torch.dtype) -> None:
    scheme, width = CASES[name], 256
    w_NK, x_XK = _weight(140, width, dtype), _inputs(1000, width, torch.float32)
    statistics = InputStatistics.of(x_XK)
    nearest = quantize_rtn(w_NK, scheme, statistics, search="inputs")
    found = quantize_gptq(w_NK, scheme, statistics)
    assert (found.codes_NK.dtype, found.scales.dtype) == (nearest.codes_NK.dtype, dtype)
    exact, x_XK = w_NK.double(), x_XK.double()
    assert _output_error(found, exact, x_XK) < 0.7 * _output_error(nearest, exact, x_XK)


@pytest.mark.parametrize("name", list(CASES))
def test_outputs_are_no_smaller(name: str) -> None:
    """Those of a row (of 128 where one scale is for so many): all its scales are multiplied by one number for that."""
    scheme = CASES[name]
    w_NK, x_XK = _weight(140, 160, torch.float64), _inputs(400, 160, torch.float64)
    statistics = InputStatistics.of(x_XK)
    found = quantize_gptq(w_NK, scheme, statistics)
    product = product_of("inputs", scheme, statistics, len(w_NK), torch.float64)
    scales, zeros = find_parameters(to_groups(w_NK, scheme), scheme, torch.float64, product)
    factors = found.scales / scales
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-12, atol=0)
    plain = quantized_tensor(found.codes_NK, scales, zeros, scheme, torch.float64)
    rows = torch.arange(140).split(BLOCK if scheme.strategy == "block" else 1)
    for n, some in enumerate(rows):
        exact, kept, before = (
            x_XK @ one[some].T for one in (w_NK, *(q.dequantize(torch.float64) for q in (found, plain)))
        )
        assert float((exact * kept).sum()) == pytest.approx(float(exact.square().sum()), rel=1e-9)
        assert float(factors[n, 0]) == pytest.approx(float(exact.square().sum() / (exact * before).sum()), rel=1e-9)


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    scheme = CASES["w4a16-32"]
    first_NK, second_NK = _weight(24, 64, torch.float64).split([16, 8])
    statistics = InputStatistics.of(_inputs(300, 64, torch.float64))
    both = quantize_gptq(torch.cat((first_NK, second_NK)), scheme, statistics).split(
        "both", torch.arange(24).split([16, 8])
    )
    for one, part in zip((first_NK, second_NK), both, strict=True):
        alone = quantize_gptq(one, scheme, statistics)
        assert torch.equal(alone.codes_NK, part.codes_NK)
        assert torch.equal(alone.scales, part.scales)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    scheme = CASES["w4a16-32"]
    w_NK, x_XK = _weight(8, 64, torch.float64), _inputs(300, 64, torch.float64)
    dead = [0, 17, 63]
    x_XK[:, dead] = 0
    found = quantize_gptq(w_NK, scheme, InputStatistics.of(x_XK))
    nearest = (w_NK / found.scales.repeat_interleave(32, 1)).round().clamp(*scheme.limits)
    assert torch.equal(found.codes_NK[:, dead].double(), nearest[:, dead])
    moved = w_NK.clone()
    moved[:, dead] *= 0.9  # smaller: the ranges of the groups stay
    again = quantize_gptq(moved, scheme, InputStatistics.of(x_XK))
    alive = [k for k in range(64) if k not in dead]
    assert torch.equal(found.codes_NK[:, alive], again.codes_NK[:, alive])


def test_fewer_tokens_than_inputs_are_enough() -> None:
    x_XK = _inputs(5, 64, torch.float32)
    w_NK, scheme = _weight(8, 64, torch.float32), CASES["w4a16-32"]
    statistics = InputStatistics.of(x_XK)
    found = quantize_gptq(w_NK, scheme, statistics)
    assert _output_error(found, w_NK, x_XK) < 0.5 * _output_error(quantize_rtn(w_NK, scheme), w_NK, x_XK)


def test_factor_is_that_of_the_damped_inverse() -> None:
    x_XK = _inputs(300, 48, torch.float64)
    hessian_KK = x_XK.T @ x_XK
    u_KK = inverse_factor(hessian_KK)
    damped_KK = hessian_KK + DAMPING[0] * hessian_KK.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    assert torch.equal(u_KK, u_KK.triu())
    torch.testing.assert_close(u_KK.T @ u_KK @ damped_KK, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-10)


def test_damping_rises_until_the_factor_exists() -> None:
    """A matrix with one eigenvalue below zero, as rounding makes them, needs more than the first damping."""
    q_KK = torch.linalg.qr(_weight(32, 32, torch.float64)).Q
    values = torch.full((32,), 1.0, dtype=torch.float64)
    values[0] = -0.15
    u_KK = inverse_factor(q_KK @ values.diag() @ q_KK.T)
    damping = (torch.linalg.inv(u_KK.T @ u_KK) - q_KK @ values.diag() @ q_KK.T).diagonal().mean() / (30.85 / 32)
    assert float(damping) == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    statistics = InputStatistics.of(_inputs(300, 64, torch.float32))
    statistics.hessian_KK[3, 5] = statistics.hessian_KK[5, 3] = bad
    with pytest.raises(HessianError, match="cannot be factored"):
        quantize_gptq(_weight(8, 64, torch.float32), CASES["w4a16-32"], statistics)


def test_no_input_at_all_is_rounding_to_nearest() -> None:
    w_NK, scheme = _weight(8, 64, torch.float32), CASES["w4a16-32"]
    found = quantize_gptq(w_NK, scheme, InputStatistics.of(torch.zeros(4, 64)))
    assert torch.equal(found.codes_NK, quantize_rtn(w_NK, scheme).codes_NK)
