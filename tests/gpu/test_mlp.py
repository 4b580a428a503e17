"""The feed-forward layer on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.mlp.activation import ACTIVATIONS
from trine.kernels.mlp.op import GATED_ACTIVATIONS, gated_mlp, gated_mlp_reference, mlp, mlp_reference

# Error over the root mean square of the exact values: (largest, mean). Each result is a sum of thousands of rounded
# products, so that errors are a few roundings of a typical value.
BOUNDS = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (1.2e-1, 1e-2), torch.float16: (2e-2, 2e-3)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
BIASES = ("gate_bias", "up_bias", "down_bias")
# Their slopes jump, so that a gate whose sign or limit is decided by rounding has quite another gradient.
JUMPING = ("relu", "swiglu_clamped")


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, weights: torch.dtype | None = None, *, exact: bool = False
) -> list[Tensor]:
    """x, gate, up and down weights, and the three biases; with `exact` gate and up are sums without rounding."""
    n, c, f = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes: tuple[tuple[int, ...], ...] = ((n, c), (f, c), (f, c), (c, f), (f,), (f,), (c,))
    tensors = [torch.randn(size, device="cuda", generator=generator) for size in sizes]
    for place in (1, 2, 3):
        tensors[place] /= sizes[place][1] ** 0.5
    if exact:
        tensors[0] = fraction(tensors[0], 4)
        tensors[1:3] = [fraction(w * c**0.5 / 8, 64) for w in tensors[1:3]]
        tensors[4:6] = [fraction(b, 16) for b in tensors[4:6]]
    kind = weights or dtype
    return [t.to(dtype if place == 0 else kind).requires_grad_() for place, t in enumerate(tensors)]


def fraction(x: Tensor, parts: int) -> Tensor:
    return (x * parts).round().clamp(-2 * parts, 2 * parts) / parts


def gated(tensors: list[Tensor], activation: str, function: object = gated_mlp) -> Tensor:
    limit = 1.0 if activation == "swiglu_clamped" else None
    named = dict(zip(BIASES, tensors[4:], strict=True))
    result: Tensor = function(*tensors[:4], activation=activation, limit=limit, **named)  # type: ignore[operator]
    return result


def plain(tensors: list[Tensor], activation: str, function: object = mlp) -> Tensor:
    x, _, up, down, _, up_bias, down_bias = tensors
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    result: Tensor = function(x, up, down, activation=activation, **biases)  # type: ignore[operator]
    return result


def gradients(y: Tensor, dy: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(y, tensors, dy.to(y.dtype), allow_unused=True))


def check(found: list[Tensor | None], exact: list[Tensor | None], dtype: torch.dtype) -> None:
    largest, mean = BOUNDS[dtype]
    for place, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        size = float(b.square().mean().sqrt())
        a, b = a.detach(), b.detach()
        error = (a.double() - b).abs()
        assert float(error.max()) <= largest * size, f"result {place}: largest error {float(error.max()) / size:.2e}"
        assert float(error.mean()) <= mean * size, f"result {place}: mean error {float(error.mean()) / size:.2e}"


@DTYPES
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated_mlp(activation: str, dtype: torch.dtype) -> None:
    tensors = make((2048, 2048, 5632), dtype, exact=activation in JUMPING)
    dy = torch.randn(tensors[0].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
    y = gated(tensors, activation)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = gated(exact, activation, gated_mlp_reference)
    check([y, *gradients(y, dy, tensors)], [expected.detach(), *gradients(expected, dy, exact)], dtype)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str, dtype: torch.dtype) -> None:
    tensors = make((2048, 768, 3072), dtype, exact=activation in JUMPING)
    dy = torch.randn(tensors[0].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
    y = plain(tensors, activation)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = plain(exact, activation, mlp_reference)
    check([y, *gradients(y, dy, tensors)], [expected.detach(), *gradients(expected, dy, exact)], dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 5, 123), (16, 4096, 1000), (33, 123, 65), (129, 72, 257), (0, 64, 32)], ids=str)
def test_odd_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors = make(shape, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dy = torch.ones(shape[:2], device="cuda")
    y, expected = gated(tensors, "silu"), gated(exact, "silu", gated_mlp_reference)
    if shape[0]:
        check([y, *gradients(y, dy, tensors)], [expected.detach(), *gradients(expected, dy, exact)], dtype)
    else:
        assert y.shape == expected.shape
        assert all(g is not None and not g.any() for g in gradients(y, dy, tensors))


def test_weights_in_fp32_get_gradients_in_fp32() -> None:
    tensors = make((4096, 1024, 2816), torch.bfloat16, torch.float32)
    y = gated(tensors, "silu")
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    found = gradients(y, dy, tensors)
    exact = [t.detach().bfloat16().double().requires_grad_() for t in tensors]
    expected = gated(exact, "silu", gated_mlp_reference)
    check([y, *found], [expected.detach(), *gradients(expected, dy, exact)], torch.bfloat16)
    for tensor, gradient in zip(tensors, found, strict=True):
        assert gradient is not None
        assert gradient.dtype == tensor.dtype
    # Not rounded to bf16 on the way.
    for gradient in found[1:4]:
        assert gradient is not None
        assert not torch.equal(gradient.bfloat16().float(), gradient)


@DTYPES
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    tensors = make((3000, 1024, 2816), dtype)
    dy = torch.ones(3000, 1024, device="cuda", dtype=dtype)
    runs = []
    for _ in range(2):
        y = gated(tensors, "silu")
        runs.append([y, *gradients(y, dy, tensors)])
    for a, b in zip(*runs, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_offsets_past_2_to_the_31() -> None:
    """h and dh have more than 2^31 numbers; the last rows are compared."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    n, c, f = 2**17 + 5, 64, 2**14 + 64
    assert n * f > 2**31
    x, wg, wu, wd, *_ = make((n, c, f), torch.bfloat16)
    y = gated_mlp(x, wg, wu, wd, activation="silu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    last = x[-300:].detach().double().requires_grad_()
    expected = gated_mlp_reference(last, *(w.detach().double() for w in (wg, wu, wd)), activation="silu")
    (dlast,) = torch.autograd.grad(expected.sum(), last)
    check([y[-300:], dx[-300:]], [expected.detach(), dlast], torch.bfloat16)


def test_keeps_no_activation_for_the_backward() -> None:
    tensors = make((8192, 1024, 4096), torch.bfloat16)
    gated(tensors, "silu")  # what a first call allocates for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = gated(tensors, "silu")
    kept = torch.cuda.memory_allocated() - before
    assert kept <= y.nbytes + 2**21
