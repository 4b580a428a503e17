"""Few rows times float8 and MXFP4 codes, in loops that decode them in registers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.cpu import float_rows
from trine.kernels.quantized_moe.rows import FloatRows, linear_rows

pytestmark = pytest.mark.skipif(
    not float_rows.multiplies(1, float_rows.BLOCK), reason="no Numba, or no vectors of 512 bits"
)
SHAPES = pytest.mark.parametrize(("n", "k"), [(300, 320), (128, 32), (3, 96), (1, 64), (131, 1024)])


def make(kind: str, n: int, k: int, spread: int) -> FloatRows:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (n, k if kind == "fp8" else k // 2), generator=generator).to(torch.uint8)
    if kind == "mxfp4":
        scales = torch.randint(118, 130, (n, k // 32), generator=generator).to(torch.uint8)
        scales[0, 0] = 0  # stands for a subnormal number
    else:
        codes[(codes & 127) == 127] = 0
        shape = (n, 1) if spread == 1 else (-(-n // 128), -(-k // 128))
        scales = torch.rand(shape, generator=generator) + 0.1
    return FloatRows(codes.view(torch.int8), scales, kind, spread)


def exact(x: Tensor, weight: FloatRows) -> Tensor:
    return x.double() @ weight.dequantize(torch.float32, slice(None)).double().t()


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert float((found.double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 8, 16])
@SHAPES
@pytest.mark.parametrize(("kind", "spread"), [("fp8", 1), ("fp8", 128), ("mxfp4", 1)])
def test_products_equal_float64(kind: str, spread: int, n: int, k: int, num_rows: int) -> None:
    weight, x = make(kind, n, k, spread), torch.randn(num_rows, k, generator=torch.Generator().manual_seed(1))
    close(weight.multiply(x), exact(x, weight))


@pytest.mark.parametrize("k", [33, 63, 100, 257])
@pytest.mark.parametrize("spread", [1, 128])
def test_rows_end_within_a_block(spread: int, k: int) -> None:
    weight, x = make("fp8", 140, k, spread), torch.randn(2, k, generator=torch.Generator().manual_seed(1))
    close(weight.multiply(x), exact(x, weight))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_every_code(kind: str) -> None:
    """By rows with a single one in them; the halves of a byte are neighbours, the low one first."""
    width = 256 if kind == "fp8" else 512
    codes = torch.arange(256).where((torch.arange(256) % 128 != 127) | (kind == "mxfp4"), 0).to(torch.uint8)
    scales = torch.ones(1, 1) if kind == "fp8" else torch.full((1, width // 32), 127, dtype=torch.uint8)
    weight = FloatRows(codes.view(torch.int8)[None], scales, kind, 1)
    found = torch.cat([weight.multiply(rows) for rows in torch.eye(width).split(16)])
    assert torch.equal(found, weight.dequantize(torch.float32, slice(None)).t())


@pytest.mark.parametrize(("kind", "spread"), [("fp8", 1), ("fp8", 128), ("mxfp4", 1)])
def test_bits_of_a_row_depend_on_it_alone(kind: str, spread: int) -> None:
    weight, x = make(kind, 300, 320, spread), torch.randn(7, 320, generator=torch.Generator().manual_seed(2))
    together = weight.multiply(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(weight.multiply(x), together)
    finally:
        torch.set_num_threads(before)
    for m in range(len(x)):
        assert torch.equal(weight.multiply(x[m : m + 1])[0], together[m])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_takes_any_dtype_and_adds_its_bias(dtype: torch.dtype) -> None:
    weight, generator = make("fp8", 140, 96, 1), torch.Generator().manual_seed(3)
    x, bias = torch.randn(3, 96, generator=generator).to(dtype), torch.randn(140, generator=generator).to(dtype)
    expected = exact(x, weight) + bias.double()
    found = linear_rows(x, weight, bias)
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) <= torch.finfo(dtype).eps * float(expected.abs().max()) + 1e-5


def test_what_the_loops_do_not_take() -> None:
    assert not float_rows.multiplies(0, 64)
    assert not float_rows.multiplies(float_rows.MOST_ROWS + 1, 64)
    assert float_rows.multiplies(float_rows.MOST_ROWS, 64)
    assert not float_rows.multiplies(1, float_rows.BLOCK - 1)
