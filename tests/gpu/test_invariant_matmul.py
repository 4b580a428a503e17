"""The batch-invariant product on a GPU: real sizes against float64, and the same bits for a row everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from trine.kernels.invariant.configs import MATMUL, _config, tiles_for
from trine.kernels.invariant.op import invariant_matmul, keeps_row_bits, launch_product
from trine.kernels.target import target_of
from trine.kernels.tuning import force

# Largest error over the root mean square of the exact values, beyond the rounding of the result itself.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def operands(rows: int, width: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = [draw(rows, width, dtype=dtype), draw(columns, width, dtype=dtype, seed=1)]
    return [*tensors, draw(columns, dtype=dtype, seed=2)]


def check(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    above = (found.double() - exact).abs() - torch.finfo(dtype).eps * exact.abs()
    error = float(above.max()) / float(exact.square().mean().sqrt())
    assert error <= BOUNDS[dtype], f"largest error {error:.2e}"


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(1, 4096, 4096), (17, 4096, 14336), (300, 1000, 777), (2048, 4096, 4096), (4099, 3001, 1003), (3000, 8, 8)],
    ids=str,
)
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in operands(*shape, dtype)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = invariant_matmul(*tensors), torch.nn.functional.linear(*exact)
    dy = draw(*y.shape, dtype=dtype, seed=3)
    check(y.detach(), expected.detach(), dtype)
    mine = torch.autograd.grad(y, tensors, dy)
    theirs = torch.autograd.grad(expected, exact, dy.double())
    for a, b in zip(mine, theirs, strict=True):
        check(a, b, dtype)
    again = torch.autograd.grad(invariant_matmul(*tensors), tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


@DTYPES
def test_the_probe_says_yes(dtype: torch.dtype) -> None:
    assert keeps_row_bits(dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("columns", [640, 4096, 14336])
@pytest.mark.parametrize("width", [4096, 1000, 999])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(width: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(4200, width, columns, dtype)
    together = invariant_matmul(x, weight, bias)
    for count in (1, 2, 3, 4, 5, 8, 16, 17, 63, 64, 65, 128, 129, 255, 256, 1000, 2048):
        for first in (0, 1, 5, 129, 4200 - count):
            part = invariant_matmul(x[first : first + count], weight, bias)
            assert torch.equal(part, together[first : first + count]), (first, count)
    # Among other rows, those that are not numbers included.
    other = torch.full_like(x[:500], float("nan"))
    other[123] = x[4000]
    assert torch.equal(invariant_matmul(other, weight, bias)[123], together[4000])


@DTYPES
def test_every_tile_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, bias = operands(700, 2048, 1500, dtype)
    target = target_of(x)
    results = []
    for tile, group in itertools.product(tiles_for(dtype, target), (1, 8)):
        with force({MATMUL.operation: _config(tile, dtype, target, group)}):
            results.append(invariant_matmul(x, weight, bias))
    assert all(torch.equal(result, results[0]) for result in results)


@DTYPES
def test_descriptors_and_pointers_give_the_same_bits(dtype: torch.dtype) -> None:
    """A slice that does not begin at a multiple of 16 bytes cannot be fetched by TMA."""
    x, weight, bias = operands(300, 1024, 2048, dtype)
    wide = torch.zeros(300, 1031, dtype=dtype, device="cuda")
    wide[:, 3:1027] = x
    expected = invariant_matmul(x, weight, bias)
    assert torch.equal(invariant_matmul(wide[:, 3:1027], weight, bias), expected)


@DTYPES
def test_the_input_gradient_keeps_the_bits_too(dtype: torch.dtype) -> None:
    """A row of dx depends on its row of dy alone."""
    dy, weight = draw(1000, 4096, dtype=dtype), draw(4096, 2048, dtype=dtype, seed=1)
    together = launch_product(dy, weight, None, b_transposed=True)
    for count in (1, 3, 64, 200):
        part = launch_product(dy[10 : 10 + count], weight, None, b_transposed=True)
        assert torch.equal(part, together[10 : 10 + count])


def test_offsets_past_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    weight = draw(512, 64, dtype=torch.bfloat16, seed=1)
    for width in (64, 67):  # with TMA and without
        rows = 2**31 // 512 + 300
        x = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
        x[-300:] = draw(300, 64, dtype=torch.bfloat16)
        far = torch.nn.functional.pad(x, (0, width - 64))[:, :64]
        y = invariant_matmul(far, weight)
        assert y.numel() > 2**31
        assert torch.equal(y[-300:], invariant_matmul(x[-300:].clone(), weight))
        assert (y[:-300:100_000] == 0).all()
        del y
    # Lines of an operand far apart.
    far = torch.zeros(300, 2**24, dtype=torch.bfloat16, device="cuda")
    far[:, -64:] = draw(300, 64, dtype=torch.bfloat16)
    for part in (far[:, -64:], far[:, -65:-1]):
        assert torch.equal(invariant_matmul(part, weight), invariant_matmul(part.contiguous(), weight))
