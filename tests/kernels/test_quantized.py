"""Quantized products on the CPU, and the launch configurations of their kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.cpu import byte_tiles, float_rows, table
from trine.kernels.cpu.codes import has_tiles
from trine.kernels.cpu.compiled import available, why_not
from trine.kernels.cpu.float8 import to_bfloat16
from trine.kernels.cpu.quantize import float8_rows
from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.quantized import cpu, packing
from trine.kernels.quantized import scaled_weight as scaled_weights
from trine.kernels.quantized.activations import QUANTIZE, QuantizedRows, quantize_reference
from trine.kernels.quantized.decode import DEQUANTIZE, dequantize
from trine.kernels.quantized.epilogue import COMBINE
from trine.kernels.quantized.op import quantize_rows, quantized_gated, quantized_linear, rms_norm_quantize
from trine.kernels.quantized.packing import pack, unpack
from trine.kernels.quantized.reference import dequantize_reference, product_reference
from trine.kernels.quantized.scaled import SCALED
from trine.kernels.quantized.scaled import shared_estimate as scaled_estimate
from trine.kernels.quantized.scaled_weight import ScaledWeight, scaled_weight
from trine.kernels.quantized.weight_only import WEIGHT_ONLY, shared_estimate, splits_for
from trine.kernels.rms_norm import rms_norm
from trine.kernels.target import COMPILED, INTERPRETER

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FLOAT8 = torch.float8_e4m3fn
# Error allowed, in units of the largest exact number: a few roundings of terms and result.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(
    n: int, k: int, groups: int, bits: int, zeros: bool = False, scales: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
    points = torch.randint(-half, half, (n, groups), generator=generator, dtype=torch.int8) if zeros else None
    scale = (torch.rand(n, groups, generator=generator) + 0.5) / (half * k**0.5)
    return values, scale.to(scales), points


def float8(n: int, k: int, form: str, seed: int = 0) -> ScaledWeight:
    shape = {"features": (n, 1), "all": (), "blocks": (-(-n // 128), -(-k // 128))}[form]
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.001 + 0.0001
    return scaled_weight(make(n, k, seed=seed).mul(40).clamp(-448, 448).to(FLOAT8), scales)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert float((found.double() - exact).abs().max()) <= BOUNDS[dtype] * float(exact.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (5, 129, 1), (32, 320, 10), (16, 256, 2), (0, 64, 2)])
@pytest.mark.parametrize("layout", ["rows", "lanes"])
def test_packing_gives_back_what_it_got(
    layout: str, n: int, k: int, groups: int, bits: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "available", lambda: layout == "lanes")
    given = codes(n, k, groups, bits, zeros)
    weight = pack(*given, bits=bits)
    assert weight.layout == layout
    assert (weight.num_features, weight.width) == (n, k)
    for a, b in zip(unpack(weight), given, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
    assert weight.num_bytes >= n * k * bits // 8


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["pieces", "torch"])
def test_dequantizing_rounds_once(
    path: str, scales: torch.dtype, zeros: bool, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, monkeypatch)
    given = codes(70, 192, 6, bits, zeros, scales)
    expected = dequantize_reference(*given, torch.float32).to(dtype)
    assert torch.equal(dequantize(pack(*given, bits=bits), dtype), expected)


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have weights packed for a path of `kernels/cpu/table.py`, and multiplied by it."""
    if path in table.COMPILED:
        if not available():
            pytest.skip(why_not() or "")
        if path in ("tiles", "slabs") and not has_tiles():
            pytest.skip("this CPU has no matrix tiles (AMX)")
    else:
        monkeypatch.setattr(packing, "available", lambda: False)
    monkeypatch.setattr(cpu, "choose", lambda kind, rows, among: path)


@DTYPES
@pytest.mark.parametrize("path", ["loops", "tiles", "slabs", "planes", "pieces", "packed", "torch"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(32, 256, 2), (48, 128, 1), (19, 150, 1), (16, 320, 10)])
def test_weight_only(
    n: int, k: int, groups: int, zeros: bool, bits: int, path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every path that there is; "packed" are torch's kernels for packed weights, where they can."""
    if path in ("tiles", "slabs") and dtype != torch.bfloat16:
        pytest.skip("tiles take rows of bf16")
    take(f"int{bits}pack" if path == "packed" else path, monkeypatch)
    given = codes(n, k, groups, bits, zeros)
    weight, exact = pack(*given, bits=bits), dequantize_reference(*given)
    assert (weight.lanes is not None) == (path in table.COMPILED)
    assert (weight.decode is not None) == (weight.lanes is None and bits == 4 and n % 16 == 0)
    bias = make(n, seed=1)
    for rows in (0, 1, 5, 33):
        x = make(rows, k, dtype=dtype)
        if not rows:
            assert quantized_linear(x, weight).shape == (0, n)
            continue
        close(quantized_linear(x, weight), product_reference(x, None, exact), dtype)
        found = quantized_linear(x, weight, bias, activation="silu")
        close(found, product_reference(x, None, exact, None, bias, "silu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_table_is_asked_for_the_path(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, tuple[str, ...]]] = []

    def choose(kind: str, rows: int, among: tuple[str, ...]) -> str:
        asked.append((kind, rows, among))
        return table.choose(kind, rows, among)

    monkeypatch.setattr(cpu, "choose", choose)
    kind = f"{bits} bits by {str(dtype).removeprefix('torch.')}"
    for numba in {available(), False}:
        monkeypatch.setattr(packing, "available", lambda numba=numba: numba)
        quantized_linear(make(3, 256, dtype=dtype), pack(*codes(32, 256, 1, bits), bits=bits))
        among = table.LANES_PATHS if numba else table.ROWS_PATHS
        assert asked.pop() == (kind, 3, among)
        assert asked == []


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mean", [0.0, 2.0])
@pytest.mark.parametrize("path", ["loops", "packed"])
def test_few_rows_are_as_exact_as_the_dequantized_weight(
    path: str, mean: float, scales: torch.dtype, zeros: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of the plain bf16 product, plus a rounding; with rows whose sums are large, too."""
    take(f"int{bits}pack" if path == "packed" else path, monkeypatch)
    given = codes(128, 1024, 8 if bits == 4 else 1, bits, zeros, scales)
    weight, exact_w = pack(*given, bits=bits), dequantize_reference(*given)
    x = (make(8, 1024) + mean).bfloat16()
    exact = x.double() @ exact_w.t()
    plain = x @ exact_w.bfloat16().t()
    ours, theirs = ((y.double() - exact).abs().max() for y in (quantized_linear(x, weight), plain))
    assert ours <= 2 * theirs + 2**-8 * exact.abs().max()


@pytest.mark.parametrize("path", ["pieces", "torch"])
def test_pieces_cover_a_weight_larger_than_the_buffer(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    given = codes(2100, 1024, 8, 4, True)
    weight, exact = pack(*given, bits=4), dequantize_reference(*given)
    x, bias = make(6, 1024), make(2100, seed=1)
    close(quantized_linear(x, weight, bias), x.double() @ exact.t() + bias, torch.float32)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated_and_its_gradient(activation: str) -> None:
    given = [codes(32, 64, 2, 4, seed=s) for s in (1, 2)]
    gate, up = (pack(*g, bits=4) for g in given)
    exact = [dequantize_reference(*g) for g in given]
    x, bias = make(2, 3, 64).requires_grad_(), make(32, seed=3).requires_grad_()
    limit = 0.9 if activation == "swiglu_clamped" else None
    y = quantized_gated(x, gate, up, activation=activation, limit=limit, gate_bias=bias, up_bias=bias)
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    expected = product_reference(wide[0], exact[0], exact[1], wide[1], wide[1], activation, limit)
    close(y.detach(), expected.detach(), torch.float32)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, bias)), torch.autograd.grad(expected.sum(), wide), strict=True):
        close(a, b, torch.float32)


@DTYPES
def test_gradient_of_few_rows_in_half_precision(dtype: torch.dtype) -> None:
    given = codes(32, 64, 2, 4)
    x = make(2, 64, dtype=dtype).requires_grad_()
    y = quantized_linear(x, pack(*given, bits=4))
    (dx,) = torch.autograd.grad(y.sum(), x)
    close(dx, torch.ones(2, 32, dtype=torch.float64) @ dequantize_reference(*given), dtype)


@DTYPES
@pytest.mark.parametrize("form", ["int8", "features", "all", "blocks"])
def test_scaled(form: str, dtype: torch.dtype) -> None:
    n, k = 140, 300
    if form == "int8":
        values = codes(n, k, 1, 8)[0]
        weight = scaled_weight(values, torch.rand(n) * 0.001 + 0.0001)
    else:
        weight = float8(n, k, form)
    exact, x, bias = weight.dequantize(torch.float64), make(2, 3, k, dtype=dtype), make(n, seed=1)
    rows = quantize_rows(x, weight.kind, blocks=weight.blocked)
    wide = rows.dequantize(torch.float64)
    close(quantized_linear(x, weight), wide @ exact.t(), dtype)
    close(quantized_linear(rows, weight, bias, activation="relu2"), (wide @ exact.t() + bias).relu().square(), dtype)
    found = quantized_gated(rows, weight, weight, activation="silu", gate_bias=bias, up_bias=bias)
    close(found, product_reference(wide, exact, exact, bias, bias, "silu"), dtype)
    if not weight.blocked:
        given = quantize_rows(x, weight.kind, scale=torch.tensor(0.05))
        close(quantized_linear(given, weight), given.dequantize(torch.float64) @ exact.t(), dtype)
    assert quantized_linear(x[:0], weight).shape == (0, 3, n)
    assert quantized_linear(x[0, 0], weight).shape == (n,)


def test_scaled_weight_keeps_its_codes() -> None:
    for form in ("features", "all", "blocks"):
        weight = float8(140, 300, form)
        assert weight.to("cpu") is weight  # to make it anew would take seconds of loading a model
        again = scaled_weight(weight.plain_codes(), weight.scales)
        assert torch.equal(again.scales, weight.scales)
        given = make(140, 300).mul(40).clamp(-448, 448).to(FLOAT8).float()
        assert again.plain_codes().dtype == FLOAT8
        assert again.plain_codes().float().equal(given)
        assert weight.plain_codes().float().equal(given)
    values = codes(70, 2100, 1, 8)[0]
    assert torch.equal(scaled_weight(values, torch.ones(70)).plain_codes(), values)


def test_float8_codes_as_bfloat16() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    found, numbers = to_bfloat16(every), ~every.float().isnan()
    assert torch.equal(~found.isnan(), numbers)
    assert torch.equal(found[numbers].float(), every.float()[numbers])
    assert torch.equal(found[numbers].signbit(), every.float()[numbers].signbit())  # of zeros too
    rows = every.view(8, 32)[:, 3:20]
    assert torch.equal(to_bfloat16(rows).nan_to_num(1.0), rows.to(torch.bfloat16).nan_to_num(1.0))


@pytest.mark.skipif(not available(), reason=why_not() or "")
def test_codes_begin_with_a_line_of_the_cache() -> None:
    """As those of a mapped file need not; others are kept where they are."""
    memory = torch.arange(64 * 3, dtype=torch.int8)
    for first in (1, 64):
        values = memory[first : first + 64].view(1, 64)
        kept = scaled_weight(values, torch.ones(1)).codes
        assert torch.equal(kept, values)
        assert kept.data_ptr() % 64 == 0
    assert kept.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("vnni", [False, True])
def test_integer_products_are_exact(monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    """Also where partial sums are as large as they get; in oneDNN's layout, and plain, as compiled steps read codes."""
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr("trine.kernels.quantized.scaled_weight.available", lambda: not vnni)
    values = codes(19, 1000, 1, 8)[0]
    values[0], values[1] = -128, 127
    weight = scaled_weight(values, torch.ones(19))
    assert weight.packed == vnni
    rows = codes(7, 1000, 1, 8, seed=1)[0]
    rows[0], rows[1] = -127, 127
    for count in (1, 7):
        x = QuantizedRows(rows[:count], torch.ones(count, 1), torch.float32)
        expected = (rows[:count].double() @ values.double().t()).float()
        assert torch.equal(quantized_linear(x, weight), expected)


@pytest.mark.parametrize(("rows", "outputs", "width"), [(48, 32, 64), (77, 96, 1024), (130, 64, 192)])
def test_many_rows_of_bytes_in_matrix_tiles_are_exact(rows: int, outputs: int, width: int) -> None:
    if not (available() and has_tiles()):
        pytest.skip("this CPU has no matrix tiles, or there is no Numba")
    values, x = codes(outputs, width, 1, 8)[0], codes(rows, width, 1, 8, seed=1)[0]
    values[0], x[-1] = -128, 127
    assert byte_tiles.fits(values)
    sums, one = (x.double() @ values.double().t()).float(), torch.ones(1)
    assert torch.equal(byte_tiles.multiply_rows(x, one, values, one, None, torch.float32), sums)


@pytest.mark.parametrize("scales", [70, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_in_matrix_tiles_have_the_bits_of_torchs(
    dtype: torch.dtype, scales: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bias (which the tiles add without rounding before); also where rows are taken in several parts."""
    if not (available() and has_tiles()):
        pytest.skip("this CPU has no matrix tiles, or there is no Numba")
    for outputs, width in ((96, 192), (32, 32768)):
        values, x = codes(outputs, width, 1, 8)[0], make(70, width, dtype=dtype)
        rows = quantize_rows(x, torch.int8)
        if scales == 1:
            rows = quantize_rows(x, torch.int8, scale=torch.tensor([0.03]))
        weight, bias = scaled_weight(values, make(outputs, seed=1).abs()), make(outputs, seed=2)
        tiles = (
            quantized_linear(rows, weight),
            quantized_linear(rows, weight, bias),
            quantized_linear(rows, weight, activation="silu"),
        )
        with monkeypatch.context() as patch:
            patch.setattr(byte_tiles, "FEWEST_ROWS", 71)
            plain = (
                quantized_linear(rows, weight),
                quantized_linear(rows, weight, bias),
                quantized_linear(rows, weight, activation="silu"),
            )
        assert torch.equal(tiles[0], plain[0])
        assert torch.equal(tiles[2], plain[2])
        close(tiles[1], plain[1].double(), dtype)


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
def test_codes_of_rows(kind: torch.dtype) -> None:
    limit = 127 if kind == torch.int8 else 448
    x = make(4, 200)
    x[2] = 0
    found = quantize_rows(x, kind)
    assert torch.equal(found.scales[:2, 0], x[:2].abs().amax(1) / limit)
    assert float(found.scales[2]) == pytest.approx(1e-30)
    assert not found.codes[2].float().any()
    step = found.scales * (0.5 if kind == torch.int8 else 16)
    assert ((found.dequantize() - x).abs() <= step * 1.0001).all()
    if kind == FLOAT8:
        blocks = quantize_rows(x, kind, blocks=True)
        assert torch.equal(blocks.scales[0, 1], x[0, 128:].abs().max() / limit)
        assert blocks.dequantize(torch.float64).shape == x.shape


@pytest.mark.skipif(not available(), reason=why_not() or "")
@DTYPES
@pytest.mark.parametrize("shape", [(1, 7), (5, 301), (2, 3, 64), (64,), (0, 8), (3, 0)])
def test_compiled_codes_have_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make(*shape, dtype=dtype) * 3
    if shape == (5, 301):
        x[1], x[2, 300], x[3, 0], x[4] = 0, float("nan"), float("-inf"), x[4] * 2**-14
    found, expected = quantize_rows(x, torch.int8), quantize_reference(x, torch.int8)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.scales, expected.scales, rtol=0, atol=0, equal_nan=True)
    assert found.dtype == dtype


@pytest.mark.skipif(not available(), reason=why_not() or "")
@DTYPES
@pytest.mark.parametrize("block", [128, 301])
def test_compiled_float8_numbers_are_those_of_the_codes(block: int, dtype: torch.dtype) -> None:
    """Of all sizes from what rounds to zero to the largest, and ties between two codes."""
    x = make(5, 301, dtype=dtype) * torch.logspace(-7, 3, 301).to(dtype)
    x[1], x[2, 300], x[3, 0] = 0, float("nan"), float("-inf")
    x[4] = torch.arange(301) / 64 + 0.5  # in units of its scale, which 448 / 64 makes 2^-6, whole and half quanta
    x[4, ::128] = 448 / 64
    numbers, scales = float8_rows(x, block)
    expected = quantize_reference(x, FLOAT8, blocks=block == 128)
    assert numbers.dtype == torch.bfloat16
    torch.testing.assert_close(numbers.float(), expected.codes.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scales, expected.scales, rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("width", [300, 133])  # a last block of blocks, and one of less than a vector
@pytest.mark.parametrize("form", ["features", "all", "blocks"])
def test_float8_weights_are_kept_as_codes_or_as_numbers(
    form: str, width: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, bias, found = make(rows, width, dtype=dtype), make(140, seed=1), []
    for coded in {float_rows.keeps_codes(float8(140, width, form).plain_codes()), False}:
        monkeypatch.setattr(scaled_weights, "keeps_codes", lambda codes, coded=coded: coded)
        weight = float8(140, width, form)
        assert weight.codes.dtype == (FLOAT8 if coded else torch.bfloat16)
        given = quantize_rows(x, FLOAT8, blocks=form == "blocks")
        exact = given.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
        close(quantized_linear(x, weight, bias), exact + bias.double(), dtype)
        found.append(weight.plain_codes())
    assert torch.equal(found[0].float(), found[-1].float())


def test_a_float8_code_of_nan_stays_one() -> None:
    values = float8(140, 300, "features").plain_codes().clone()
    values.view(torch.uint8)[7, 3] = 0xFF
    weight = scaled_weight(values, torch.ones(140))
    for rows in (2, 40):
        y = quantized_linear(make(rows, 300), weight)
        assert y[:, 7].isnan().all()
        assert y.isnan().sum() == rows


def test_codes_behind_rms_norm() -> None:
    x, residual, weight = make(3, 96), make(3, 96, seed=1), make(96, seed=2)
    rows, total = rms_norm_quantize(x, weight, 1e-6, kind=torch.int8, residual=residual)
    assert total is not None
    assert torch.equal(total, x + residual)
    expected = quantize_reference(rms_norm(x + residual, weight, 1e-6), torch.int8)
    assert torch.equal(rows.codes, expected.codes)
    assert torch.equal(rows.scales, expected.scales)
    assert rms_norm_quantize(x, weight, 1e-6, kind=FLOAT8)[1] is None


def test_compiles_whole() -> None:
    given = codes(32, 64, 2, 4)
    weight, coded = pack(*given, bits=4), scaled_weight(given[0], torch.ones(32))

    def function(x: Tensor) -> Tensor:
        return quantized_linear(x, weight, activation="silu") + quantized_linear(x, coded)

    x = make(9, 64)
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x))


# --- refusals ---------------------------------------------------------------------------------------------------------


def int8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("arguments", "bits", "message"),
    [
        ((int8(2, 64), torch.ones(2, 1)), 3, "bits is 3; it must be 4 or 8"),
        ((torch.zeros(2, 64), torch.ones(2, 1)), 4, r"values are torch.float32 \(2, 64\); expected int8"),
        ((int8(2, 0), torch.ones(2, 1)), 4, r"\(2, 0\); expected int8 \[N, K\], K positive"),
        ((int8(2, 64), torch.ones(3, 1)), 4, r"scales are torch.float32 \(3, 1\).*\[2, G\]"),
        ((int8(2, 64), torch.ones(2, 1).double()), 4, "scales are torch.float64"),
        ((int8(2, 64), torch.ones(2, 1, requires_grad=True)), 4, "scales require a gradient"),
        ((int8(2, 64), torch.ones(2, 4)), 4, "4 groups for 64 columns"),
        ((int8(2, 65), torch.ones(2, 2)), 4, "2 groups for 65 columns"),
        ((int8(2, 64), torch.ones(2, 2), int8(2, 1)), 4, r"zeros are torch.int8 \(2, 1\); expected int8 \(2, 2\)"),
        ((int8(2, 64) + 8, torch.ones(2, 1)), 4, "values of 4 bits must be in -8 .. 7"),
        ((int8(2, 64), torch.ones(2, 1), int8(2, 1) + 9), 4, "zeros of 4 bits must be in -8 .. 8"),
    ],
)
def test_bad_weights_are_refused(arguments: tuple[Any, ...], bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(*arguments, bits=bits)


@pytest.mark.parametrize(
    ("given", "scales", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2), "codes are torch.float32"),
        (int8(2, 3), torch.ones(3), r"scales are torch.float32 \(3,\)"),
        (int8(200, 300), torch.ones(2, 3), r"scales are torch.float32 \(2, 3\) for torch.int8"),
        (int8(2, 3), int8(2), "scales are torch.int8"),
    ],
)
def test_bad_scaled_weights_are_refused(given: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_weight(given, scales)


def test_bad_calls_are_refused() -> None:
    weight = pack(*codes(32, 64, 2, 4), bits=4)
    other = pack(*codes(32, 64, 2, 8), bits=8)
    coded, blocked = scaled_weight(int8(32, 64), torch.ones(32)), float8(140, 300, "blocks")
    x, rows = make(3, 64), quantize_rows(make(3, 64), torch.int8)
    calls: list[tuple[Any, str]] = [
        (lambda: quantized_linear(x[:, :3], weight), r"x is torch.float32 \(3, 3\).*\[\.\.\., 64\]"),
        (lambda: quantized_linear(x.double(), weight), "x is torch.float64"),
        (lambda: quantized_linear(x, weight, make(3)), r"bias is torch.float32 \(3,\)"),
        (lambda: quantized_linear(x, weight, activation="tanh"), "'tanh'; it must be one of none, silu"),
        (lambda: quantized_linear(rows, weight), "x has codes torch.int8, which the weight cannot take: 4-bit"),
        (lambda: quantized_linear(quantize_rows(x, FLOAT8), coded), "x has codes torch.float8_e4m3fn"),
        (
            lambda: quantized_linear(quantize_rows(make(3, 300), FLOAT8), blocked),
            r"x has scales \(3, 1\); the weight wants \(3, 3\)",
        ),
        (lambda: quantized_linear(x.to("meta"), weight), "x is on meta but the weight on cpu"),
        (lambda: quantized_gated(x, weight, other, activation="silu"), "gate is 4-bit.*but up is 8-bit"),
        (lambda: quantized_gated(x, weight, coded, activation="silu"), "both must have one scheme"),
        (lambda: quantized_gated(x, weight, weight, activation="none"), "'none'; it must be one of"),
        (lambda: quantized_gated(x, weight, weight, activation="silu", limit=7.0), "limit is 7.0"),
        (lambda: quantized_gated(x, weight, weight, activation="silu", up_bias=make(32)), "both or neither"),
        (lambda: quantized_linear(x, coded, fast_sums=True), "fast_sums is for float8 weights"),
        (lambda: quantize_rows(x, torch.float8_e5m2), "kind is torch.float8_e5m2"),
        (lambda: quantize_rows(x, torch.int8, blocks=True), "blocks is True with torch.int8"),
        (lambda: quantize_rows(x, FLOAT8, scale=make(3)), r"scale is torch.float32 \(3,\)"),
        (lambda: quantize_rows(x.clone().requires_grad_(), FLOAT8), "x requires a gradient"),
        (lambda: rms_norm_quantize(x, make(3), 1e-6, kind=FLOAT8), r"weight is torch.float32 \(3,\)"),
        (
            lambda: rms_norm_quantize(x, make(64), 1e-6, kind=FLOAT8, residual=make(2, 64)),
            r"residual is torch.float32 \(2, 64\)",
        ),
        (lambda: dequantize(weight, torch.float64), "dtype is torch.float64"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_built_by_hand_are_checked() -> None:
    rows = QuantizedRows(int8(3, 64), torch.ones(2, 1), torch.float32)
    with pytest.raises(ValueError, match=r"x has scales \(2, 1\); the weight wants \(3, 1\)"):
        quantized_linear(rows, scaled_weight(int8(32, 64), torch.ones(32)))


# --- configurations ---------------------------------------------------------------------------------------------------

TARGETS = pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
ROWS = pytest.mark.parametrize("rows", [0, 1, 17, 64, 100, 300, 8192])


def powers_of_two(config: Any) -> bool:
    return all(size & (size - 1) == 0 for size in config.blocks.values())


@TARGETS
@ROWS
@pytest.mark.parametrize("bits", [4, 8])
def test_configurations_of_packed_weights(bits: int, rows: int, target: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for products in (1, 2):
            shape = {"M": rows, "N": 4096, "K": 4096, "exact_bits": bits, "exact_products": products}
            config = WEIGHT_ONLY.pick(dtype, target, **shape)
            assert powers_of_two(config)
            assert config.blocks["ROWS"] >= 16
            assert shared_estimate(config, bits, dtype, target) <= target.shared_bytes
            candidates = WEIGHT_ONLY.candidates(shape, dtype, target)
            assert 1 < len(candidates) <= 90
            assert all(powers_of_two(c) for c in candidates)
            assert all(shared_estimate(c, bits, dtype, target) <= target.shared_bytes for c in candidates)


@TARGETS
@ROWS
@pytest.mark.parametrize("partial", [0, 1])
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
def test_configurations_of_scaled_weights(kind: torch.dtype, partial: int, rows: int, target: Any) -> None:
    for products in (1, 2):
        shape = {"M": rows, "N": 4096, "K": 4096, "exact_products": products, "exact_partial": partial}
        config = SCALED.pick(kind, target, **shape)
        assert powers_of_two(config)
        # One scale for each step over K.
        assert config.blocks["INNER"] == 128
        assert config.blocks["FEATURES"] <= 128
        assert scaled_estimate(config) <= target.shared_bytes
        candidates = SCALED.candidates(shape, kind, target)
        assert all(c.blocks["FEATURES"] <= 128 and scaled_estimate(c) <= target.shared_bytes for c in candidates)


@TARGETS
def test_other_configurations(target: Any) -> None:
    for width in (1, 128, 5120, 65536):
        config = QUANTIZE.pick(torch.bfloat16, target, M=8192, K=width)
        assert powers_of_two(config)
    assert powers_of_two(DEQUANTIZE.pick(torch.bfloat16, target, N=4096, K=4096))
    assert powers_of_two(COMBINE.pick(torch.bfloat16, target, M=16, N=4096, S=4))


def test_splits() -> None:
    target = COMPILED["sm_90"]
    assert splits_for(128, 64, 1, 4096, target) == 4
    assert splits_for(10_000, 64, 1, 4096, target) == 1
    # A part has at least four pieces.
    assert splits_for(1, 8, 1, 4096, target) == 2
    # Many rows: no more than every multiprocessor needs.
    assert splits_for(32, 64, 256, 2048, target) == 4
    assert splits_for(132, 64, 256, 2048, target) == 1
