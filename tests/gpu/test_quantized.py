"""Products with quantized weights on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.quantized.activations import quantize_reference
from trine.kernels.quantized.decode import dequantize
from trine.kernels.quantized.op import quantize_rows, quantized_gated, quantized_linear, rms_norm_quantize
from trine.kernels.quantized.packing import PackedWeight, pack, unpack
from trine.kernels.quantized.reference import dequantize_reference, product_reference
from trine.kernels.quantized.registered import MANY_ROWS
from trine.kernels.quantized.scaled_weight import ScaledWeight, scaled_weight
from trine.kernels.rms_norm import rms_norm

# Error over the root mean square of the exact values: (largest, mean); beyond the rounding of the result itself.
BOUNDS = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (6e-2, 5e-3), torch.float16: (1e-2, 1e-3)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
FLOAT8 = torch.float8_e4m3fn
ROWS = pytest.mark.parametrize("rows", [1, 3, 16, 33, 128, 300, MANY_ROWS + 1])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def codes(
    n: int, k: int, groups: int, bits: int, zeros: bool = False, scales: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator("cuda").manual_seed(seed)
    half = 1 << (bits - 1)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8, device="cuda")

    scale = (torch.rand(n, groups, generator=generator, device="cuda") + 0.5) / (half * k**0.5)
    return draw(n, k), scale.to(scales), draw(n, groups) if zeros else None


def packed(*arguments: Any, **named: Any) -> tuple[PackedWeight, Tensor]:
    """A weight and its exact numbers in float64."""
    given = codes(*arguments, **named)
    return pack(*given, bits=arguments[3]), dequantize_reference(*given)


def scaled(n: int, k: int, kind: torch.dtype, form: str = "features", seed: int = 0) -> ScaledWeight:
    shape = {"features": (n,), "all": (1,), "blocks": (-(-n // 128), -(-k // 128))}[form]
    scales = torch.rand(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed + 1)) + 0.5
    limit = 127 if kind == torch.int8 else 448
    return scaled_weight(quantize_reference(randn(n, k, seed=seed), kind).codes, scales * 4 / (limit * k**0.5))


def needs_float8() -> None:
    if torch.cuda.get_device_capability() < (8, 9) and torch.version.hip is None:
        pytest.skip("float8 products need sm_89")


def check(found: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """`roundings`: how often the result, or what it is a product of, is rounded on its way."""
    largest, mean = BOUNDS[dtype]
    assert found.dtype == dtype
    size = float(exact.square().mean().sqrt())
    error = (found.double() - exact).abs()
    above = float((error - roundings * torch.finfo(dtype).eps * exact.abs()).max())
    assert above <= largest * size, f"largest error {above / size:.2e}"
    assert float(error.mean()) <= mean * size, f"mean error {float(error.mean()) / size:.2e}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (1000, 4100, 1), (4096, 4096, 128), (300, 11008, 86)])
def test_packing_and_dequantizing_are_exact(n: int, k: int, groups: int, bits: int) -> None:
    given = codes(n, k, groups, bits, True)
    weight = pack(*given, bits=bits)
    for a, b in zip(unpack(weight), given, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    for dtype in BOUNDS:
        expected = dequantize_reference(*given, torch.float32).to(dtype)
        assert torch.equal(dequantize(weight, dtype), expected)


@ROWS
@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "zeros"), [(1, False), (32, False), (32, True), (64, True), (128, False)])
def test_weight_only(groups: int, zeros: bool, bits: int, dtype: torch.dtype, rows: int) -> None:
    weight, exact = packed(2048, 4096, groups, bits, zeros)
    x = randn(rows, 4096, dtype=dtype)
    check(quantized_linear(x, weight), x.double() @ exact.t(), dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 123, 77), (1, 1, 1), (17, 96, 4096), (129, 5000, 72), (64, 64, 8192)], ids=str)
def test_odd_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    weight, exact = packed(n, k, 1, 4, True)
    x, bias = randn(m, k, dtype=dtype), randn(n, seed=1)
    check(quantized_linear(x, weight, bias), x.double() @ exact.t() + bias, dtype)
    assert quantized_linear(x[:0], weight).shape == (0, n)
    coded = scaled(n, k, torch.int8)
    rows = quantize_rows(x, torch.int8)
    check(quantized_linear(x, coded), rows.dequantize(torch.float64) @ coded.dequantize(torch.float64).t(), dtype)


@ROWS
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated(activation: str, rows: int) -> None:
    (gate, gate_exact), (up, up_exact) = (packed(5632, 2048, 16, 4, True, seed=s) for s in (1, 2))
    x, bias = randn(rows, 2048, dtype=torch.bfloat16), randn(5632, seed=1)
    limit = 1.0 if activation == "swiglu_clamped" else None
    found = quantized_gated(x, gate, up, activation=activation, limit=limit, gate_bias=bias, up_bias=bias)
    exact = product_reference(x, gate_exact, up_exact, bias, bias, activation, limit)
    # With many rows the weights and both products are rounded to bf16 on the way, and relu2 squares one.
    check(found, exact, torch.bfloat16, 4 if rows > MANY_ROWS else 1)


@pytest.mark.parametrize("rows", [16, 2000])
def test_gradients_of_rows_and_bias(rows: int) -> None:
    weight, exact = packed(2048, 4096, 32, 4, True)
    x, bias = randn(rows, 4096, dtype=torch.bfloat16).requires_grad_(), randn(2048, seed=1).requires_grad_()
    dy = randn(rows, 2048, dtype=torch.bfloat16, seed=2)
    y = quantized_linear(x, weight, bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    check(dx, dy.double() @ exact, torch.bfloat16)
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-3, atol=1e-3)


@DTYPES
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("width", [1, 100, 4096, 14336, 65536])
def test_codes_have_the_bits_of_the_reference(width: int, kind: torch.dtype, dtype: torch.dtype) -> None:
    if kind == FLOAT8:
        needs_float8()
    x = randn(300, width, dtype=dtype) * 3
    for blocks in (False, True) if kind == FLOAT8 else (False,):
        found, expected = quantize_rows(x, kind, blocks=blocks), quantize_reference(x, kind, blocks=blocks)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.codes.float(), expected.codes.float())
    given = torch.tensor([0.02], device="cuda")
    found, expected = quantize_rows(x, kind, scale=given), quantize_reference(x, kind, scale=given)
    assert torch.equal(found.codes.float(), expected.codes.float())


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
def test_codes_behind_rms_norm(kind: torch.dtype) -> None:
    if kind == FLOAT8:
        needs_float8()
    x, residual = randn(500, 5120, dtype=torch.bfloat16), randn(500, 5120, dtype=torch.bfloat16, seed=1)
    weight = randn(5120, seed=2)
    found, total = rms_norm_quantize(x, weight, 1e-6, kind=kind, residual=residual)
    assert total is not None
    assert torch.equal(total, x + residual)
    expected = quantize_reference(rms_norm(total.float(), weight, 1e-6), kind)
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
    assert float((found.codes.float() != expected.codes.float()).float().mean()) < 0.01


@ROWS
@pytest.mark.parametrize("form", ["int8", "features", "all", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled(dtype: torch.dtype, form: str, rows: int) -> None:
    if form != "int8":
        needs_float8()
    weight = scaled(2000, 4100, torch.int8 if form == "int8" else FLOAT8, "features" if form == "int8" else form)
    x = randn(rows, 4100, dtype=dtype)
    wide = quantize_rows(x, weight.kind, blocks=weight.blocked).dequantize(torch.float64)
    check(quantized_linear(x, weight), wide @ weight.dequantize(torch.float64).t(), dtype)


def test_fast_sums_are_near() -> None:
    needs_float8()
    weight, x = scaled(2048, 4096, FLOAT8), randn(1000, 4096, dtype=torch.bfloat16)
    exact = quantize_rows(x, FLOAT8).dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
    error = (quantized_linear(x, weight, fast_sums=True).double() - exact).square().mean().sqrt()
    assert float(error) <= 0.02 * float(exact.square().mean().sqrt())


@ROWS
@pytest.mark.parametrize("form", ["int8", "features", "blocks"])
def test_scaled_gated(form: str, rows: int) -> None:
    if form != "int8":
        needs_float8()
    kind = torch.int8 if form == "int8" else FLOAT8
    gate, up = (scaled(5632, 2048, kind, "features" if form == "int8" else form, seed=s) for s in (1, 3))
    x, bias = quantize_rows(randn(rows, 2048, dtype=torch.bfloat16), kind, blocks=up.blocked), randn(5632, seed=1)
    found = quantized_gated(x, gate, up, activation="silu", gate_bias=bias, up_bias=bias)
    wide, gate_exact, up_exact = (t.dequantize(torch.float64) for t in (x, gate, up))
    check(found, product_reference(wide, gate_exact, up_exact, bias, bias, "silu"), torch.bfloat16)


@pytest.mark.parametrize("scheme", ["w4", "w8", "int8", "float8", "blocks"])
@pytest.mark.parametrize("rows", [1, 16, 200, 3000])
def test_two_runs_give_the_same_bits(rows: int, scheme: str) -> None:
    if scheme in ("float8", "blocks"):
        needs_float8()
    x = randn(rows, 4096, dtype=torch.bfloat16)
    if scheme.startswith("w"):
        runs = [quantized_linear(x, packed(4096, 4096, 32, int(scheme[1]), True)[0]) for _ in range(2)]
    else:
        form = "blocks" if scheme == "blocks" else "features"
        weight = scaled(4096, 4096, torch.int8 if scheme == "int8" else FLOAT8, form)
        runs = [quantized_linear(x, weight) for _ in range(2)]
    assert torch.equal(*runs)


def test_offsets_past_2_to_the_31() -> None:
    """The weight has more than 2^31 numbers, then the result; the last ones are compared."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    n, k = 2**16 + 40, 2**15 + 128
    assert n * k > 2**31
    coded = scaled_weight(torch.ones(n, k, dtype=torch.int8, device="cuda"), torch.ones(n, device="cuda"))
    coded.codes[-50:] = codes(50, k, 1, 8)[0]
    x = quantize_rows(randn(20, k, dtype=torch.bfloat16), torch.int8)
    exact = x.dequantize(torch.float64) @ coded.codes[-50:].double().t()
    check(quantized_linear(x, coded)[:, -50:], exact, torch.bfloat16)
    weight = pack(coded.codes, torch.ones(n, 1, device="cuda"), bits=8)
    rows = randn(20, k, dtype=torch.bfloat16)
    check(quantized_linear(rows, weight)[:, -50:], rows.double() @ coded.codes[-50:].double().t(), torch.bfloat16)
    del coded
    assert torch.equal(dequantize(weight, torch.bfloat16)[-1].to(torch.int8), unpack(weight)[0][-1])
    del weight
    small = scaled_weight(codes(2**14 + 64, 64, 1, 8)[0], torch.ones(2**14 + 64, device="cuda"))
    many = quantize_rows(randn(2**17 + 5, 64, dtype=torch.bfloat16), torch.int8)
    exact = many.dequantize(torch.float64)[-300:] @ small.codes.double().t()
    check(quantized_linear(many, small)[-300:], exact, torch.bfloat16)


def test_few_rows_never_write_the_weight() -> None:
    weight, _ = packed(8192, 8192, 64, 4)
    assert weight.num_bytes < 8192 * 8192 * 0.54
    x = randn(16, 8192, dtype=torch.bfloat16)
    quantized_linear(x, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantized_linear(x, weight)
    assert torch.cuda.max_memory_allocated() - before <= 16 * 16 * 8192 * 4 + 2**21
