"""Products with quantized weights in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.launch import recording
from trine.kernels.mlp.activation import ACTIVATIONS
from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.quantized import registered
from trine.kernels.quantized.activations import QuantizedRows, quantize_reference
from trine.kernels.quantized.decode import dequantize
from trine.kernels.quantized.op import quantize_rows, quantized_gated, quantized_linear, rms_norm_quantize
from trine.kernels.quantized.packing import PackedWeight, pack, unpack
from trine.kernels.quantized.reference import apply, dequantize_reference, product_reference
from trine.kernels.quantized.scaled_weight import ScaledWeight, scaled_weight
from trine.kernels.rms_norm import rms_norm
from trine.kernels.target import COMPILED

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BITS = pytest.mark.parametrize("bits", [4, 8])
ZEROS = pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
LIMIT = 0.9
FLOAT8 = torch.float8_e4m3fn


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_codes(
    n: int, k: int, groups: int, bits: int, zeros: bool, scales: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    points = torch.randint(-half, half, (n, groups), generator=generator, dtype=torch.int8) if zeros else None
    scale = (torch.rand(n, groups, generator=generator) + 0.5) / (half * k**0.5)
    return values, scale.to(scales), points


def packed(*arguments: Any, **named: Any) -> tuple[PackedWeight, Tensor]:
    """A weight and its exact numbers in float64."""
    values, scales, zeros = plain_codes(*arguments, **named)
    return pack(values, scales, zeros, bits=arguments[3]), dequantize_reference(values, scales, zeros)


def scaled(n: int, k: int, kind: torch.dtype, form: str = "features", seed: int = 0) -> ScaledWeight:
    numbers = make(n, k, seed=seed)
    codes = quantize_reference(numbers, kind).codes
    limit = 127 if kind == torch.int8 else 448
    shape = {"features": (n,), "all": (1,), "blocks": (-(-n // 128), -(-k // 128))}[form]
    scales = (torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) + 0.5) * 4 / (limit * k**0.5)
    return scaled_weight(codes, scales)


def plain(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The computation in the dtype of x, the weights rounded to it."""
    limit = LIMIT if activation == "swiglu_clamped" else None
    gate = None if gate is None else gate.to(x.dtype)
    return product_reference(x, gate, up.to(x.dtype), gate_bias, up_bias, activation, limit)


# --- packing ----------------------------------------------------------------------------------------------------------


@BITS
@ZEROS
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (5, 129, 1), (33, 320, 10), (16, 320, 5), (3, 256, 2)])
def test_packing_gives_back_what_it_got(n: int, k: int, groups: int, bits: int, zeros: bool) -> None:
    given = plain_codes(n, k, groups, bits, zeros)
    weight = pack(*given, bits=bits)
    assert weight.layout == "tiles"
    for a, b in zip(unpack(weight), given, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
    assert weight.words.shape == (-(-k * bits // 512), n, 16)


@BITS
def test_every_code_lies_where_the_layout_says(bits: int) -> None:
    """Bit places as `packing.py` documents them, for one code at a time."""
    size = 512 // bits
    values = torch.zeros(size + 1, size + 1, dtype=torch.int8)
    values.fill_diagonal_(-1)
    words = pack(values, torch.ones(size + 1, 1), bits=bits).words.to(torch.int64) & 0xFFFFFFFF
    for k in range(size + 1):
        block, within = divmod(k, size)
        place = bits * (within // 32) + 16 * (within % 2)
        expected = torch.zeros_like(words[:, k])
        expected[block, within % 32 // 2] = ((1 << bits) - 1) << place
        assert torch.equal(words[:, k], expected)


@DTYPES
@BITS
@ZEROS
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantizing_is_exact(scales: torch.dtype, zeros: bool, bits: int, dtype: torch.dtype) -> None:
    """Every code with every zero point of a step of 16: fp32 product, rounded once."""
    half = 1 << (bits - 1)
    values = (
        torch.arange(-half, half, dtype=torch.int8).repeat_interleave(256 // (2 * half)).expand(17, 256).contiguous()
    )
    points = (
        torch.arange(17, dtype=torch.int8)[:, None].expand(17, 4).contiguous() * (half // 8) - half if zeros else None
    )
    points = points.clamp(max=half - 1) if points is not None else None
    _, scale, _ = plain_codes(17, 256, 4, bits, False, scales)
    expected = dequantize_reference(values, scale, points, torch.float32).to(dtype)
    assert torch.equal(dequantize(pack(values, scale, points, bits=bits), dtype), expected)


# --- weight only ------------------------------------------------------------------------------------------------------


@DTYPES
@BITS
@ZEROS
@pytest.mark.parametrize(("k", "groups"), [(288, 9), (320, 5), (256, 2), (150, 1)], ids=str)
def test_weight_only(compare: Any, k: int, groups: int, zeros: bool, bits: int, dtype: torch.dtype) -> None:
    """All groups, K that fills no block, rows split over K and not."""
    weight, exact = packed(19, k, groups, bits, zeros)
    for rows in (3, 17):
        x = make(rows, k, dtype=dtype, seed=rows)
        found = quantized_linear(x, weight)
        compare.values(f"weight_only w{bits}", found, plain(x, None, exact), product_reference(x, None, exact))


@HALF
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16], ids=str)
@BITS
def test_scales_in_half_precision(compare: Any, bits: int, scales: torch.dtype, dtype: torch.dtype) -> None:
    weight, exact = packed(19, 256, 4, bits, True, scales)
    x = make(5, 256, dtype=dtype)
    compare.values(f"weight_only w{bits}", quantized_linear(x, weight), plain(x, None, exact), x.double() @ exact.t())


@pytest.mark.parametrize("rows", [2, 18, 70])
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_bias_and_activation(compare: Any, activation: str, rows: int) -> None:
    """One part, several parts of K, and by way of the dequantized weight."""
    dtype = torch.bfloat16 if activation == "silu" else torch.float16
    weight, exact = packed(21, 160, 5, 4, True)
    x, bias = make(rows, 160, dtype=dtype), make(21, seed=1)
    found = quantized_linear(x, weight, bias, activation=activation)
    expected = product_reference(x, None, exact, None, bias, activation)
    ours = plain(x, None, exact, None, bias.to(dtype), activation=activation)
    compare.values("weight_only activation", found, ours, expected)


@pytest.mark.parametrize("rows", [2, 18, 70])
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated(compare: Any, activation: str, rows: int) -> None:
    dtype = torch.float32 if activation == "silu" else torch.bfloat16
    gate, gate_exact = packed(21, 160, 5, 4, True, seed=1)
    up, up_exact = packed(21, 160, 5, 4, True, seed=2)
    x, biases = make(rows, 160, dtype=dtype), (make(21, seed=1), make(21, seed=2))
    limit = LIMIT if activation == "swiglu_clamped" else None
    gate_bias, up_bias = biases if rows != 18 else (None, None)
    found = quantized_gated(x, gate, up, activation=activation, limit=limit, gate_bias=gate_bias, up_bias=up_bias)
    expected = product_reference(x, gate_exact, up_exact, gate_bias, up_bias, activation, limit)
    low = [None if b is None else b.to(dtype) for b in (gate_bias, up_bias)]
    compare.values("weight_only gated", found, plain(x, gate_exact, up_exact, low[0], low[1], activation), expected)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients_of_rows_and_bias(compare: Any, activation: str) -> None:
    weight, exact = packed(21, 96, 3, 4, True)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = (make(5, 96, dtype=dtype), make(21, dtype=dtype, seed=1))

        def reference(x: Tensor, bias: Tensor) -> Tensor:
            return plain(x, None, exact, None, bias, activation=activation)

        compare.gradients(
            "weight_only",
            lambda x, bias: quantized_linear(x, weight, bias, activation=activation),
            lambda x, bias: plain(x, None, exact, None, bias, activation=activation),
            inputs,
        )


def test_gradients_of_a_gated_layer(compare: Any) -> None:
    gate, gate_exact = packed(18, 64, 2, 8, False, seed=1)
    up, up_exact = packed(18, 64, 2, 8, False, seed=2)
    compare.gradients(
        "weight_only gated",
        lambda x: quantized_gated(x, gate, up, activation="silu"),
        lambda x: plain(x, gate_exact, up_exact, activation="silu"),
        (make(5, 64),),
    )


def test_leading_dimensions_strides_and_no_rows() -> None:
    weight, exact = packed(18, 64, 2, 4, False)
    x = make(6, 64)
    expected = (x.double() @ exact.t()).float()
    wide = torch.zeros(2, 3, 128)
    wide[..., ::2] = x.view(2, 3, 64)
    torch.testing.assert_close(quantized_linear(wide[..., ::2], weight), expected.view(2, 3, 18))
    torch.testing.assert_close(quantized_linear(x[3], weight), expected[3])
    assert quantized_linear(x[:0], weight, make(18)).shape == (0, 18)
    assert quantized_linear(x.view(2, 3, 64)[:0], weight).shape == (0, 3, 18)
    empty = pack(torch.zeros(0, 64, dtype=torch.int8), torch.ones(0, 2), bits=4)
    assert quantized_linear(x, empty).shape == (6, 0)


def test_nan_stays_in_its_row() -> None:
    weight, _ = packed(18, 64, 2, 4, False)
    x = make(3, 64)
    x[1, 5] = float("nan")
    for activation in ("none", "relu"):
        y = quantized_linear(x, weight, activation=activation)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


# --- quantized activations --------------------------------------------------------------------------------------------


def check_codes(found: QuantizedRows, expected: QuantizedRows) -> None:
    assert found.codes.dtype == expected.codes.dtype
    assert found.dtype == expected.dtype
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.codes.float(), expected.codes.float())


@DTYPES
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (2, 3, 128), (0, 7)], ids=str)
def test_codes_have_the_bits_of_the_reference(shape: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype) -> None:
    x = make(*shape, dtype=dtype) * 3
    check_codes(quantize_rows(x, kind), quantize_reference(x, kind))
    check_codes(
        quantize_rows(x, kind, scale=torch.tensor(0.01)), quantize_reference(x, kind, scale=torch.tensor([0.01]))
    )
    if kind == FLOAT8:
        check_codes(quantize_rows(x, kind, blocks=True), quantize_reference(x, kind, blocks=True))


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
def test_rounding_ties_zeros_and_what_is_not_finite(kind: torch.dtype) -> None:
    limit = 127.0 if kind == torch.int8 else 448.0
    ties = torch.tensor([limit, 0.5, 1.5, 2.5, -0.5, -1.5, 17.0, 18.0, 19.0, -limit])
    x = torch.stack((ties, torch.zeros(10), ties * 0 + 1e-38, ties))
    x[3, 2] = float("nan")
    found = quantize_rows(x, kind)
    check_codes(QuantizedRows(found.codes[:3], found.scales[:3], x.dtype), quantize_reference(x[:3], kind))
    assert found.scales[3].isnan()
    if kind == torch.int8:
        assert found.codes[0].tolist() == [127, 0, 2, 2, 0, -2, 17, 18, 19, -127]
    given = quantize_rows(x, kind, scale=torch.tensor(0.5))
    assert given.codes[3, 2].isnan() if kind == FLOAT8 else given.codes[3, 2] == 0
    y = quantized_linear(x, scaled(5, 10, kind))
    assert y[3].isnan().all()
    assert y[:3].isfinite().all()


@DTYPES
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_codes_behind_rms_norm(compare: Any, residual: bool, kind: torch.dtype, dtype: torch.dtype) -> None:
    x, other, weight = make(5, 200, dtype=dtype), make(5, 200, dtype=dtype, seed=1), make(200, dtype=dtype, seed=2) + 1
    blocks = kind == FLOAT8 and residual
    found, total = rms_norm_quantize(
        x, weight, 1e-6, kind=kind, blocks=blocks, residual=other if residual else None, unit_offset=residual
    )
    summed = x + other if residual else x
    assert (total is not None) == residual
    if total is not None:
        assert torch.equal(total, summed)
    # In the interpreter sums in bf16 stay in fp32 until they are handed out.
    summed = x.float() + other.float() if residual and dtype == torch.bfloat16 else summed.float()
    normed = rms_norm(summed, weight.float(), 1e-6, unit_offset=residual)
    expected = quantize_reference(normed, kind, blocks=blocks)
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
    # The order of a sum decides the last bit of the norm, and that now and then the nearest code.
    differ = found.codes.float() != expected.codes.float()
    assert float(differ.float().mean()) < 0.01
    exact = expected.dequantize(torch.float64)
    step = expected.scales.max().double() * (1 if kind == torch.int8 else 32)
    assert (found.dequantize(torch.float64) - exact).abs().max() <= step * 1.01


# --- products of codes ------------------------------------------------------------------------------------------------


def check_scaled(compare: Any, name: str, x: Tensor, weight: ScaledWeight, *, scale: Tensor | None = None) -> None:
    rows = quantize_rows(x, weight.kind, blocks=weight.blocked, scale=scale)
    exact_w, exact_x = weight.dequantize(torch.float64), rows.dequantize(torch.float64)
    found = quantized_linear(rows if scale is not None else x, weight)
    compare.values(name, found, plain(rows.dequantize(), None, exact_w), exact_x @ exact_w.t())


@DTYPES
@pytest.mark.parametrize("form", ["features", "all"])
@pytest.mark.parametrize(("n", "k"), [(19, 300), (5, 16)], ids=str)
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
def test_scaled(compare: Any, kind: torch.dtype, n: int, k: int, form: str, dtype: torch.dtype) -> None:
    name = f"scaled {str(kind).removeprefix('torch.')}"
    weight = scaled(n, k, kind, form)
    for rows in (3, 18):
        check_scaled(compare, name, make(rows, k, dtype=dtype), weight)
    x = make(3, k, dtype=dtype)
    check_scaled(compare, name, x, weight, scale=torch.tensor([0.02]))
    if kind == FLOAT8:
        coded, exact = quantize_rows(x, kind), weight.dequantize(torch.float64)
        found, ours = quantized_linear(x, weight, fast_sums=True), plain(coded.dequantize(), None, exact)
        compare.values("scaled fast sums", found, ours, coded.dequantize(torch.float64) @ exact.t())


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(19, 300), (140, 256)], ids=str)
def test_scaled_blocks(compare: Any, n: int, k: int, dtype: torch.dtype) -> None:
    weight = scaled(n, k, FLOAT8, "blocks")
    assert weight.blocked
    for rows in (3, 18) if n < 128 else (3,):
        check_scaled(compare, "scaled float8 blocks", make(rows, k, dtype=dtype), weight)


def test_products_of_int8_are_exact() -> None:
    """Integers whose sums need all of int32's and none of fp32's help: rounded once."""
    codes = torch.full((16, 2048), -127, dtype=torch.int8)
    x = QuantizedRows(torch.full((17, 2048), 127, dtype=torch.int8), torch.ones(17, 1), torch.float32)
    x.codes[:, 0] = 1
    y = quantized_linear(x, scaled_weight(codes, torch.ones(16)))
    assert torch.equal(y, torch.full((17, 16), float(-127 * 127 * 2047 - 127)))


@pytest.mark.parametrize("rows", [2, 18])
@pytest.mark.parametrize("form", ["int8", "features", "blocks"])
def test_scaled_epilogues(compare: Any, form: str, rows: int) -> None:
    kind = torch.int8 if form == "int8" else FLOAT8
    gate, up = (scaled(21, 150, kind, "features" if form == "int8" else form, seed=s) for s in (1, 3))
    x, biases = make(rows, 150, dtype=torch.bfloat16), (make(21, seed=1), make(21, seed=2))
    codes = quantize_rows(x, kind, blocks=up.blocked)
    wide = codes.dequantize(torch.float64)
    low = [b.bfloat16() for b in biases]
    weights = gate.dequantize(torch.float64), up.dequantize(torch.float64)
    for activation in ("silu", "swiglu_clamped"):
        limit = LIMIT if activation == "swiglu_clamped" else None
        named: dict[str, Any] = {"activation": activation, "limit": limit}
        found = quantized_gated(x, gate, up, gate_bias=biases[0], up_bias=biases[1], **named)
        expected = product_reference(wide, *weights, *biases, **named)
        ours = plain(codes.dequantize(), weights[0], weights[1], low[0], low[1], activation)
        compare.values("scaled gated", found, ours, expected)
    found = quantized_linear(codes, up, biases[1], activation="gelu_tanh")
    expected = apply(None, wide @ weights[1].t() + biases[1], "gelu_tanh", None)
    ours = plain(codes.dequantize(), None, weights[1], None, low[1], activation="gelu_tanh")
    compare.values("scaled activation", found, ours, expected)


# --- registration and refusals ----------------------------------------------------------------------------------------


def test_registration() -> None:
    gate, up = (packed(18, 64, 2, 4, True, seed=s)[0] for s in (1, 2))
    x, bias = make(3, 64).requires_grad_(), make(18).requires_grad_()
    parts = [(w.words, w.scales, w.zeros) for w in (gate, up)]
    torch.library.opcheck(registered.weight_only_matmul, (x, None, None, None, *parts[1], None, bias, 4, "none", None))
    fixed = (x.detach(), *parts[0], *parts[1], bias.detach(), bias.detach(), 4, "silu", None)
    torch.library.opcheck(registered.weight_only_matmul, fixed)
    torch.library.opcheck(registered.weight_only_input_gradient, (make(3, 18), *parts[1], 4, 64))
    weight, rows = scaled(18, 64, torch.int8), make(3, 64)
    torch.library.opcheck(registered.quantize_rows, (rows, torch.int8, False, None))
    torch.library.opcheck(registered.quantize_rows, (rows, FLOAT8, True, None))
    torch.library.opcheck(
        registered.rms_norm_quantize, (rows, rows, make(64), 1e-6, False, torch.int8, False, torch.tensor([0.1]))
    )
    codes = quantize_rows(rows, torch.int8)
    arguments = (codes.codes, codes.scales, None, None, weight.codes, weight.scales, None, None, "none", None)
    torch.library.opcheck(registered.scaled_matmul, (*arguments, torch.bfloat16, False))


def test_compiles_whole_and_under_checkpointing() -> None:
    gate, up = (packed(18, 64, 2, 4, True, seed=s)[0] for s in (1, 2))
    weight = scaled(64, 18, torch.int8)
    x = make(3, 64).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return quantized_gated(x[None], gate, up, activation="silu").square()

    def inference(x: Tensor) -> Tensor:
        return quantized_linear(layer(x), weight)

    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)
    with torch.no_grad():
        whole = torch.compile(inference, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x), inference(x))


def test_two_runs_have_the_same_bits() -> None:
    weight, _ = packed(19, 600, 1, 4, False)
    x = make(3, 600, dtype=torch.float16)
    assert torch.equal(quantized_linear(x, weight), quantized_linear(x, weight))


def test_refusals_before_launch() -> None:
    weight, _ = packed(18, 64, 2, 4, False)
    other, _ = packed(18, 64, 1, 4, False)
    x = make(3, 64)
    with pytest.raises(ValueError, match=r"x is torch.float64 \(3, 64\); expected float32"):
        quantized_linear(x.double(), weight)
    with pytest.raises(ValueError, match=r"x is torch.float32 \(3, 32\).*64"):
        quantized_linear(x[:, :32], weight)
    with pytest.raises(ValueError, match="both must have one scheme"):
        quantized_gated(x, weight, other, activation="silu")
    with pytest.raises(ValueError, match="65537 numbers are too long"):
        quantize_rows(torch.zeros(1, 65537), torch.int8)
    for arch, refused in (("sm_80", True), ("sm_90", False)):
        with recording(COMPILED[arch]) as launches:
            if refused:
                with pytest.raises(ValueError, match="float8 is not supported on sm_80"):
                    quantized_linear(x, scaled(18, 64, FLOAT8))
            else:
                quantized_linear(x, scaled(18, 64, FLOAT8))
        assert bool(launches) != refused
    with pytest.raises(ValueError, match="x requires a gradient"):
        quantized_linear(x.requires_grad_(), scaled(18, 64, torch.int8))
