"""Rows of float8 numbers times float8 codes, both with scales: few rows in loops, many in panels, more in pieces."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from trine.kernels.cpu import float_rows, table
from trine.kernels.cpu.compiled import available, why_not
from trine.kernels.quantized import cpu
from trine.kernels.quantized.activations import QuantizedRows, quantize_reference
from trine.kernels.quantized.scaled_weight import ScaledWeight, can_join, join, scaled_weight

pytestmark = pytest.mark.skipif(not available(), reason=why_not() or "")
FLOAT8 = torch.float8_e4m3fn
FORMS = pytest.mark.parametrize("form", ["rows", "all", "blocks"])
# Outputs, inputs: fewer than are taken at once, a last block that overlaps, several groups, an odd number.
SHAPES = pytest.mark.parametrize(("n", "k"), [(3, 64), (140, 133), (131, 320), (48, 258)])


def make(n: int, k: int, form: str) -> ScaledWeight:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
    codes[(codes & 127) == 127] = 0
    shape = {"rows": (n,), "all": (1,), "blocks": (-(-n // 128), -(-k // 128))}[form]
    return scaled_weight(codes.view(FLOAT8), torch.rand(shape, generator=generator) + 0.1)


def make_rows(m: int, weight: ScaledWeight) -> QuantizedRows:
    x = torch.randn(m, weight.width, generator=torch.Generator().manual_seed(m))
    return quantize_reference(x * torch.logspace(-2, 2, weight.width), FLOAT8, blocks=weight.blocked)


def multiply(path: str, rows: QuantizedRows, weight: ScaledWeight, bias: Tensor | None = None) -> Tensor:
    numbers = rows.codes.to(torch.bfloat16)
    return cpu.float8_product(path, numbers, rows.scales, weight, bias, torch.float32)


def exact(rows: QuantizedRows, weight: ScaledWeight) -> Tensor:
    return rows.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()


def paths(weight: ScaledWeight) -> list[str]:
    """Those that can multiply by a weight here."""
    if weight.codes.dtype != FLOAT8:
        return ["torch"]
    panels = table.multiplies_bfloats() and float_rows.fits_panels(weight.num_features, weight.width)
    return ["loops", *(["panels"] if panels else []), "pieces"]


@pytest.mark.parametrize("m", [1, 3, 16, 37])
@FORMS
@SHAPES
def test_every_path_equals_float64(n: int, k: int, form: str, m: int) -> None:
    weight, bias = make(n, k, form), torch.randn(n, generator=torch.Generator().manual_seed(5))
    rows = make_rows(m, weight)
    expected = exact(rows, weight)
    for path in paths(weight):
        found = multiply(path, rows, weight, bias)
        assert found.dtype == torch.float32
        assert float((found - expected - bias).abs().max()) <= 1e-6 * float(expected.abs().max()), path


@FORMS
def test_bits_of_a_row_depend_on_it_alone(form: str) -> None:
    weight = make(140, 320, form)
    rows = make_rows(70, weight)
    before = torch.get_num_threads()
    for path in [path for path in paths(weight) if path in ("loops", "panels")]:
        together = multiply(path, rows, weight)
        for own in (slice(0, 1), slice(17, 22), slice(64, 70)):
            part = QuantizedRows(rows.codes[own], rows.scales[own], rows.dtype)
            assert torch.equal(multiply(path, part, weight), together[own])
        try:
            torch.set_num_threads(2)
            assert torch.equal(multiply(path, rows, weight), together)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_a_row_of_nan_is_nan_and_no_other(form: str) -> None:
    weight = make(64, 256, form)
    rows = make_rows(20, weight)
    rows.scales[7, -1] = torch.nan
    for path in paths(weight):
        assert multiply(path, rows, weight).isnan().any(dim=1).nonzero().flatten().tolist() == [7]


def test_one_scale_for_all_rows() -> None:
    weight = make(64, 128, "rows")
    rows = quantize_reference(torch.randn(20, 128), FLOAT8, scale=torch.tensor([0.01]))
    expected = exact(rows, weight)
    for path in paths(weight):
        assert float((multiply(path, rows, weight) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_results_are_rounded_once() -> None:
    weight = make(140, 320, "blocks")
    rows = make_rows(37, weight)
    for path in [path for path in paths(weight) if path != "pieces"]:
        numbers = rows.codes.to(torch.bfloat16)
        found = cpu.float8_product(path, numbers, rows.scales, weight, None, torch.bfloat16, last=True)
        assert torch.equal(found.bfloat16(), multiply(path, rows, weight).bfloat16())


@pytest.mark.parametrize("counts", [(256, 128, 130), (192, 64, 64), (96, 32, 7), (40, 40)])
def test_weights_of_blocks_are_joined(counts: tuple[int, ...]) -> None:
    weights = [make(count, 192, "blocks") for count in counts]
    assert can_join(weights)
    dense = [one.dequantize(torch.float64) for one in weights]
    whole, parts = join(weights)
    assert whole.codes.data_ptr() == parts[0].codes.data_ptr()
    assert torch.equal(whole.dequantize(torch.float64), torch.cat(dense))
    assert all(torch.equal(part.dequantize(torch.float64), one) for part, one in zip(parts, dense, strict=True))
    rows = make_rows(20, whole)
    for path in paths(whole):
        expected = exact(rows, whole)
        assert float((multiply(path, rows, whole) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_weights_of_blocks_and_of_rows_are_not_joined() -> None:
    assert not can_join([make(128, 192, "blocks"), make(128, 192, "rows")])


@pytest.mark.slow
@pytest.mark.skipif(not float_rows.multiplies(1, 64), reason="codes are not kept without vectors of 512 bits")
def test_a_cpu_that_does_not_multiply_bf16() -> None:
    """The same loops for another CPU, in a process of its own."""
    script = """
import torch
from trine.kernels.cpu import table
from trine.kernels.cpu.float8_loops import DOTS
assert not DOTS and not table.multiplies_bfloats()
from tests.kernels.test_cpu_float8 import exact, make, make_rows, multiply, paths
for form in ("rows", "blocks"):
    weight = make(140, 133, form)
    assert paths(weight) == ["loops", "pieces"]
    for m in (1, 5, 37):
        rows = make_rows(m, weight)
        expected = exact(rows, weight)
        for path in paths(weight):
            error = float((multiply(path, rows, weight) - expected).abs().max() / expected.abs().max())
            assert error <= 1e-6, (form, m, path, error)
"""
    changed = {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | changed)
