"""RMSNorm and LayerNorm on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from trine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference

# Largest error over the largest exact value: one rounding of the result, and a few of fp32 on the way to it.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 4.5e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
# Widths of models, powers of two or not; heads; rows wider than one block of the forward, of the backward, of both.
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (8192, 768),
        (4096, 1600),
        (8192, 4096),
        (2048, 5120),
        (2048, 8192),
        (2, 2048, 32, 128),
        (777, 12288),
        (512, 16384),
        (64, 20000),
        (64, 65536),
        (3, 131072),
        (7, 3, 5),
        (5, 123),
        (0, 64),
    ],
    ids=str,
)
NORMS = pytest.mark.parametrize("norm", ["rms", "1+rms", "layer", "layer without bias"])
EPS = 1e-5


def make(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def added(norm: str, x: Tensor, r: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if "rms" in norm:
        return add_rms_norm(x, r, weight, EPS, unit_offset=norm == "1+rms")
    return add_layer_norm(x, r, weight, bias, EPS)


def vectors(norm: str, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [make(width, seed=seed).to(dtype).requires_grad_() for seed in ((3, 4) if norm == "layer" else (3,))]


def normed(norm: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if "rms" in norm:
        return rms_norm(x, weight, EPS, unit_offset=norm == "1+rms")
    return layer_norm(x, weight, bias, EPS)


def reference(norm: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if "rms" in norm:
        return rms_norm_reference(x, weight, EPS, unit_offset=norm == "1+rms")
    return layer_norm_reference(x, weight, bias, EPS)


def close(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    if exact.numel():
        largest = float(exact.abs().max())
        error = float((found.detach().double() - exact).abs().max())
        assert error <= BOUNDS[found.dtype] * largest, f"error {error:.2e}, largest value {largest:.2e}"


@DTYPES
@NORMS
@SHAPES
def test_values_and_gradients(shape: tuple[int, ...], norm: str, dtype: torch.dtype) -> None:
    x, r = (make(*shape, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
    params = vectors(norm, shape[-1])
    total = (x + r).detach().double().requires_grad_()  # rounded before it is normalised
    exact = [v.detach().double().requires_grad_() for v in params]
    found, expected = added(norm, x, r, *params), (reference(norm, total, *exact), total)
    dy, dsum = (make(*shape, seed=seed).to(dtype) for seed in (5, 6))
    dx, dr, *mine = torch.autograd.grad(found, [x, r, *params], [dy, dsum])
    dtotal, *theirs = torch.autograd.grad(expected, [total, *exact], [dy.double(), dsum.double()])
    assert torch.equal(dx, dr)
    for a, b in zip((*found, dx, *mine), (*expected, dtotal, *theirs), strict=True):
        close(a, b.detach())
    assert {t.dtype for t in (*found, dx)} == {dtype}
    assert {t.dtype for t in mine} == {torch.float32}


@DTYPES
@NORMS
@pytest.mark.parametrize("shape", [(4096, 2048), (100, 65536)], ids=str)
def test_without_a_residual(shape: tuple[int, int], norm: str, dtype: torch.dtype) -> None:
    x, dy = make(*shape, seed=0).to(dtype).requires_grad_(), make(*shape, seed=5).to(dtype)
    params = vectors(norm, shape[1], dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, *params)]
    y, expected = normed(norm, x, *params), reference(norm, *exact)
    mine, theirs = torch.autograd.grad(y, [x, *params], dy), torch.autograd.grad(expected, exact, dy.double())
    for a, b in zip((y, *mine), (expected, *theirs), strict=True):
        assert a.dtype == dtype
        close(a, b.detach())


def test_a_large_mean_costs_no_digits() -> None:
    x = make(4096, 1024, seed=0) + 4096.0
    weight, bias = (v.detach() for v in vectors("layer", 1024))
    expected = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS)
    error = (layer_norm(x, weight, bias, EPS).double() - expected).abs().max()
    assert float(error) < 5e-3  # half a unit of the mean is 2e-4


@DTYPES
@NORMS
@pytest.mark.parametrize("shape", [(30000, 1024), (8191, 4096), (262144, 128), (300, 65536)], ids=str)
def test_two_runs_give_the_same_bits(shape: tuple[int, int], norm: str, dtype: torch.dtype) -> None:
    leaves = [*(make(*shape, seed=seed).to(dtype).requires_grad_() for seed in (0, 1)), *vectors(norm, shape[1], dtype)]
    runs = []
    for _ in range(2):
        results = added(norm, *leaves)
        runs.append([*results, *torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@DTYPES
@NORMS
@pytest.mark.parametrize("width", [64, 128, 768, 999, 1600, 4096, 8200, 16384, 20000, 65536])
def test_a_row_has_the_same_bits_alone_and_among_others(width: int, norm: str, dtype: torch.dtype) -> None:
    num_rows = 300
    x, r = (make(num_rows, width, seed=seed).to(dtype) for seed in (0, 1))
    params = [v.detach() for v in vectors(norm, width, dtype)]
    together = added(norm, x, r, *params)
    assert torch.equal(normed(norm, together[1], *params), together[0])
    for count in (1, 2, 3, 5, 16, 17, 32, 100):
        for first in (0, 1, 7, num_rows - count):
            rows = slice(first, first + count)
            parts = added(norm, x[rows], r[rows], *params)
            assert all(torch.equal(part, whole[rows]) for part, whole in zip(parts, together, strict=True))
    # Rows that begin anywhere in memory.
    far = torch.empty(100 * width + 1, dtype=dtype, device="cuda")[1:].view(100, width).copy_(together[1][:100])
    assert torch.equal(normed(norm, far, *params), together[0][:100])


@NORMS
def test_strided_rows(norm: str) -> None:
    x, r = (make(512, 3, 256, seed=seed)[:, 1, ::2] for seed in (0, 1))
    assert not x.is_contiguous()
    params = [v.detach() for v in vectors(norm, 128)]
    close(added(norm, x, r, *params)[0], reference(norm, (x + r).double(), *(v.double() for v in params)))


@pytest.mark.parametrize("width", [4096, 65536])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_offsets_past_2_to_the_31(norm: str, width: int) -> None:
    """More than 2^31 numbers; the last rows are compared."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    num_rows = 2**31 // width + 37
    x = torch.zeros(num_rows, width, device="cuda", dtype=torch.bfloat16)
    x[-300:] = make(300, width, seed=0).bfloat16()
    x.requires_grad_()
    params = vectors(norm, width)
    y = normed(norm, x, *params)
    dy = torch.ones((), device="cuda", dtype=torch.bfloat16).expand_as(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = x.detach()[-300:].double().requires_grad_()
    expected = reference(norm, last, *(v.detach().double() for v in params))
    (dlast,) = torch.autograd.grad(expected.sum(), last)
    close(y.detach()[-300:], expected.detach())
    close(dx[-300:], dlast)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_keeps_one_activation_for_the_backward(norm: str) -> None:
    """Of x, r, their sum and y only the sum, and two numbers a row."""
    x, r = (make(8192, 4096, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    params = vectors(norm, 4096)
    added(norm, x, r, *params)  # what a first call allocates for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, total = added(norm, x, r, *params)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= y.nbytes + total.nbytes + 8192 * 8 + 2**20


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_float64_is_refused(norm: str) -> None:
    x, r, w = make(4, 8, seed=0).double(), make(4, 8, seed=1).double(), make(8, seed=2)
    with pytest.raises(ValueError, match="float64, which the kernel does not support"):
        added(norm, x, r, w)
