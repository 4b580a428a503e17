"""Compiled products with 4- and 8-bit codes on the CPU: against float64, their layout, dequantizing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.cpu import codes, compiled
from trine.kernels.cpu.codes import (
    LanesWeight,
    codes_matvec,
    dequantize_lanes,
    from_lanes,
    has_tiles,
    lanes_pieces,
    slabs_matmul,
    tiles_matmul,
    to_lanes,
)
from trine.kernels.cpu.planes import planes_matmul

pytestmark = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")

# Outputs, inputs and groups: one for a row, groups of 32, 64 and 128; tiles and chunks that are filled up.
SHAPES = [(1, 1, 1), (5, 129, 1), (32, 256, 1), (16, 320, 10), (37, 192, 3), (48, 256, 2)]
SCALES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    n: int, k: int, groups: int, bits: int, zeros: bool, scales: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values_NK, scales_NG, zeros_NG) with codes and zero points of the whole range."""
    generator = torch.Generator().manual_seed(n * k + groups + bits)
    limit = 2 ** (bits - 1)
    values = torch.randint(-limit, limit, (n, k), generator=generator, dtype=torch.int8)
    values[0, 0], values[-1, -1] = -limit, limit - 1
    low, high = (-8, 9) if bits == 4 else (-128, 128)
    points = torch.randint(low, high, (n, groups), generator=generator, dtype=torch.int8)
    return values, torch.rand(n, groups, generator=generator).add(0.1).to(scales), points if zeros else None


def dequantized(values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    whole = values.double().view(*scales.shape, -1)
    whole = whole if zeros is None else whole - zeros.double()[:, :, None]
    return (whole * scales.double()[:, :, None]).view(values.shape)


def lanes(bits: int, zeros: bool, n: int = 37, k: int = 192, groups: int = 3) -> tuple[LanesWeight, Tensor]:
    parts = make(n, k, groups, bits, zeros)
    return to_lanes(*parts, bits), dequantized(*parts)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_the_layout_gives_back_what_it_got(
    n: int, k: int, groups: int, scales: torch.dtype, zeros: bool, bits: int
) -> None:
    parts = make(n, k, groups, bits, zeros, scales)
    for found, given in zip(from_lanes(to_lanes(*parts, bits)), parts, strict=True):
        assert (found is None) == (given is None)
        assert found is None or given is None or torch.equal(found, given)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("mean", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_products_are_as_exact_as_torchs(
    n: int, k: int, groups: int, dtype: torch.dtype, mean: float, zeros: bool, bits: int
) -> None:
    parts = make(n, k, groups, bits, zeros)
    weight, exact_weight = to_lanes(*parts, bits), dequantized(*parts)
    x_all = torch.randn(15, k, generator=torch.Generator().manual_seed(7)).add(mean).to(dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(8))
    for rows in (1, 2, 3, 15):  # every number of rows that is multiplied at once, and all of them in turn
        x = x_all[:rows]
        for b in (None, bias):
            exact = x.double() @ exact_weight.t() + (0 if b is None else b.double())
            eager = (x.float() @ exact_weight.float().t() + (0 if b is None else b)).to(dtype)
            found = codes_matvec(x, weight, b)
            assert found.dtype == dtype
            error, allowed = (float((y.double() - exact).abs().max()) for y in (found, eager))
            assert error <= 2 * allowed + torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_products_of_planes_round_inputs_as_little_as_their_dtype(
    n: int, k: int, groups: int, dtype: torch.dtype, zeros: bool, bits: int
) -> None:
    """Rows that fill no block of planes, outputs that fill no pair of tiles; inputs of very different size."""
    parts = make(n, k, groups, bits, zeros)
    weight, exact_weight = to_lanes(*parts, bits), dequantized(*parts)
    sizes = torch.logspace(-3, 0, 15)[:, None]
    # Codes and zero points are multiplied apart.
    weights_N = exact_weight.abs().sum(dim=1) + (parts[1].double().sum(dim=1) * (k / groups) * 128 if zeros else 0)
    x_all = (torch.randn(15, k, generator=torch.Generator().manual_seed(7)) * sizes).to(dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(8))
    for rows in (1, 2, 4, 15):
        x = x_all[:rows]
        for b in (None, bias):
            exact = x.double() @ exact_weight.t() + (0 if b is None else b.double())
            found = planes_matmul(x, weight, b)
            assert found.dtype == dtype
            step = (2**-15 if dtype == torch.bfloat16 else 2**-22) * x.double().abs().amax(dim=1)[:, None]
            rounding = torch.finfo(dtype).eps / 2 * exact.abs() + step * weights_N
            assert ((found.double() - exact).abs() <= rounding).all()


def test_planes_keep_what_is_no_number_in_its_row() -> None:
    weight, _ = lanes(8, True)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1, 50], x[6, 3] = float("nan"), float("inf")
    found = planes_matmul(x, weight)
    assert found.isnan().all(dim=1).nonzero().flatten().tolist() == [1, 6]
    assert found.isfinite().all(dim=1).sum() == 7
    assert torch.equal(planes_matmul(x[2:3], weight), found[2:3])


@pytest.mark.parametrize("bits", [4, 8])
def test_planes_take_rows_by_as_many_as_the_cache_holds(bits: int, threads: None) -> None:
    """K so large that the second cache holds two blocks of it; the same bits whatever the number of threads."""
    weight = to_lanes(*make(48, 32768, 1, bits, False, torch.bfloat16), bits)
    x = torch.randn(18, 32768, generator=torch.Generator().manual_seed(7)).bfloat16()
    found, exact = planes_matmul(x, weight), x.double() @ dequantize_lanes(weight, torch.float32).double().t()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4 * float(exact.abs().max()))
    for number in (1, 2):
        torch.set_num_threads(number)
        assert torch.equal(planes_matmul(x, weight), found)


@pytest.mark.skipif(not has_tiles(), reason="this CPU has no matrix tiles (AMX)")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_products_in_tiles_round_only_the_result(n: int, k: int, groups: int, zeros: bool, bits: int) -> None:
    parts = make(n, k, groups, bits, zeros)
    weight, exact_weight = to_lanes(*parts, bits), dequantized(*parts)
    x_all = torch.randn(100, k, generator=torch.Generator().manual_seed(7)).bfloat16()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(8))
    for rows in (1, 16, 33, 64, 100):  # one, two and four tiles of rows, filled up and in turn
        x = x_all[:rows]
        for b in (None, bias):
            exact = x.double() @ exact_weight.t() + (0 if b is None else b.double())
            found = tiles_matmul(x, weight, b)
            assert found.dtype == torch.bfloat16
            assert float((found.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


@pytest.mark.skipif(not has_tiles(), reason="this CPU has no matrix tiles (AMX)")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_products_in_slabs_are_those_of_the_weight_in_bf16(n: int, k: int, groups: int, zeros: bool, bits: int) -> None:
    """Outputs that fill no slab of 32, rows that fill no pair of tiles, and none."""
    weight = to_lanes(*make(n, k, groups, bits, zeros, torch.bfloat16), bits)
    w = dequantize_lanes(weight, torch.bfloat16).double()
    x_all = torch.randn(70, k, generator=torch.Generator().manual_seed(7)).bfloat16()
    bias = torch.randn(n, generator=torch.Generator().manual_seed(8))
    for rows in (0, 1, 32, 70):
        x = x_all[:rows]
        for b in (None, bias):
            exact = x.double() @ w.t() + (0 if b is None else b.double())
            found = slabs_matmul(x, weight, b)
            assert found.dtype == torch.bfloat16
            sizes = x.double().abs() @ w.abs().t()
            assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + k * 2**-23 * sizes).all()


@pytest.mark.skipif(not has_tiles(), reason="this CPU has no matrix tiles (AMX)")
def test_slabs_take_rows_by_as_many_as_the_cache_holds() -> None:
    """K so large that the second cache holds 32 rows of it, which are multiplied before the next."""
    weight = to_lanes(*make(48, 32768, 1, 8, False, torch.bfloat16), 8)
    x = torch.randn(70, 32768, generator=torch.Generator().manual_seed(7)).bfloat16()
    x[50, 3] = float("nan")
    found, exact = slabs_matmul(x, weight), x.double() @ dequantize_lanes(weight, torch.bfloat16).double().t()
    assert found.isnan().any(dim=1).nonzero().flatten().tolist() == [50]
    torch.testing.assert_close(
        found.double(), exact, rtol=2**-8, atol=1e-3 * float(exact[:50].abs().max()), equal_nan=True
    )


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_scales_come_in_every_dtype(scales: torch.dtype) -> None:
    parts = make(32, 256, 8, 4, False, scales)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ dequantized(*parts).t()
    torch.testing.assert_close(codes_matvec(x, to_lanes(*parts, 4)).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_dequantizing_rounds_once(n: int, k: int, groups: int, dtype: torch.dtype, zeros: bool, bits: int) -> None:
    parts = make(n, k, groups, bits, zeros, torch.bfloat16)  # whose products with codes are exact in fp32
    found = dequantize_lanes(to_lanes(*parts, bits), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dequantized(*parts).to(dtype))


def test_pieces_cover_a_weight_larger_than_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_PIECE_NUMBERS", 2 * 16 * 192)
    weight, exact = lanes(4, True, n=67)
    pieces = list(lanes_pieces(weight, torch.float32))
    assert [outputs.stop for outputs, _ in pieces] == [32, 64, 67]
    assert torch.equal(dequantize_lanes(weight, torch.float32), exact.float())


def test_rounding_to_bf16_does_not_need_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    from trine.kernels.cpu import codes_loops, lanes_loops

    weight, exact = lanes(4, True)
    monkeypatch.setattr(lanes_loops, "host_has", lambda feature: False)
    (parts, shifts), out = weight.arguments, torch.empty(192, 48, dtype=torch.bfloat16)
    source: Any = codes_loops.dequantize_codes
    anew = compiled.parallel(source.py_func)
    anew(parts, shifts, 0, 3, compiled.array(out))
    assert torch.equal(out[:, :37].t(), exact.float().bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_repeat_whatever_the_number_of_threads(bits: int, threads: None) -> None:
    weight, _ = lanes(bits, False, 128, 320, 10)
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(1))
    results = []
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        results.append((codes_matvec(x, weight), dequantize_lanes(weight, torch.bfloat16)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_is_no_number_stays_in_its_row() -> None:
    weight, _ = lanes(4, False)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    x[1, 50] = float("nan")
    assert codes_matvec(x, weight).isnan().all(dim=1).tolist() == [False, True, False]
    assert codes_matvec(x, weight).isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize(("rows", "n"), [(0, 5), (3, 0)])
def test_nothing_gives_nothing(rows: int, n: int) -> None:
    weight = to_lanes(torch.zeros(n, 64, dtype=torch.int8), torch.ones(n, 2), None, 4)
    assert codes_matvec(torch.ones(rows, 64), weight).shape == (rows, n)
    assert planes_matmul(torch.ones(rows, 64), weight).shape == (rows, n)
    assert dequantize_lanes(weight, torch.float32).shape == (n, 64)
