"""The LayerNorm kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_forward, layer_norm_reference
from trine.kernels.tuning import Config, force

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BIAS = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
# Rows of many blocks, as very wide ones are: three blocks of 16 numbers here.
WIDE = {
    "norm_forward": Config({"BLOCK_C": 16}),
    "norm_backward": Config({"ROWS": 2, "STAGES": 1, "BLOCK_C": 16}),
}
EPS = 1e-5


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(width: int, biased: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(make(width, dtype=dtype, seed=seed) for seed in ((1, 2) if biased else (1,)))


def ours(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return layer_norm(x, w, b, EPS)


def plain(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return layer_norm_reference(x, w, b, EPS)


def ours_added(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return add_layer_norm(x, r, w, b, EPS)


def plain_added(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return layer_norm_reference(x + r, w, b, EPS), x + r


@DTYPES
@BIAS
@pytest.mark.parametrize("shape", [(1, 5), (5, 123), (2, 7, 64), (9, 1000), (3, 2, 5, 16)], ids=str)
def test_layer_norm(compare: Any, shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    compare.gradients("layer_norm", ours, plain, (make(*shape, dtype=dtype), *parameters(shape[-1], biased)))


@DTYPES
@BIAS
def test_add_layer_norm(compare: Any, biased: bool, dtype: torch.dtype) -> None:
    inputs = make(5, 123, dtype=dtype), make(5, 123, dtype=dtype, seed=3), *parameters(123, biased, dtype)
    compare.gradients("add_layer_norm", ours_added, plain_added, inputs)


@DTYPES
@BIAS
def test_rows_of_many_blocks(compare: Any, biased: bool, dtype: torch.dtype) -> None:
    x, residual, vectors = make(5, 41, dtype=dtype), make(5, 41, dtype=dtype, seed=3), parameters(41, biased)
    with force(WIDE):
        compare.gradients("layer_norm wide", ours, plain, (x, *vectors))
        compare.gradients("add_layer_norm wide", ours_added, plain_added, (x, residual, *vectors))


@pytest.mark.parametrize("configs", [{}, WIDE], ids=["whole rows", "many blocks"])
def test_a_large_mean_costs_no_digits(compare: Any, configs: dict[str, Config]) -> None:
    """Here the mean of squares minus the square of the mean has no right digit; half a unit of the mean is 2e-4."""
    x = (make(3, 40) + 4096.0).requires_grad_()
    vectors = parameters(40, True)
    with force(configs):
        found = ours(x, *vectors)
        (dx,) = torch.autograd.grad(found.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = plain(exact, *vectors)
    compare.values("layer_norm far from zero", found, plain(x, *vectors), expected)
    torch.testing.assert_close(dx.double(), torch.autograd.grad(expected.square().sum(), exact)[0], rtol=0, atol=5e-3)


def test_one_gradient_of_the_two_results_is_enough() -> None:
    for use in (0, 1):
        x, r, w, b = (t.requires_grad_() for t in (make(5, 8), make(5, 8, seed=1), make(8, seed=2), make(8, seed=3)))
        found = torch.autograd.grad(ours_added(x, r, w, b)[use].sum(), (x, r, w, b), allow_unused=True)
        expected = torch.autograd.grad(plain_added(x, r, w, b)[use].sum(), (x, r, w, b), allow_unused=True)
        for a, e in zip(found, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a, e)


def test_empty_and_strided_rows() -> None:
    w, b = (t.requires_grad_() for t in parameters(8, True))
    y = ours(torch.empty(0, 8), w, b)
    assert y.shape == (0, 8)
    for gradient in torch.autograd.grad(y.sum(), (w, b)):
        assert torch.equal(gradient, torch.zeros(8))
    x = make(6, 16)[::2, ::2]
    torch.testing.assert_close(ours(x, w, b), plain(x, w, b))
    torch.testing.assert_close(ours(make(8, 6).t(), w, b), plain(make(8, 6).t(), w, b))


def test_registration() -> None:
    x, r, w, b = (t.requires_grad_() for t in (make(5, 16), make(5, 16, seed=1), make(16, seed=2), make(16, seed=3)))
    torch.library.opcheck(layer_norm_forward, (x, None, w, None, EPS))
    torch.library.opcheck(layer_norm_forward, (x, r, w, b, EPS))


def test_compiles_whole_and_under_checkpointing() -> None:
    x, r, w, b = (t.requires_grad_() for t in (make(5, 16), make(5, 16, seed=1), make(16, seed=2), make(16, seed=3)))

    def function(x: Tensor) -> Tensor:
        y, total = add_layer_norm(x, r, w, b, EPS)
        return y.square() + total

    expected = torch.autograd.grad(function(x).sum(), (x, w, b))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    for y in (compiled(x), again):
        for a, e in zip(torch.autograd.grad(y.sum(), (x, w, b)), expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8), torch.zeros(7), None), r"weight has shape \(7,\).*\[C\]"),
        ((torch.zeros(2, 8), torch.zeros(8), torch.zeros(1)), r"bias has shape \(1,\)"),
        ((torch.zeros(2, 8).int(), torch.zeros(8), None), "int32"),
        ((torch.zeros(2, 8).double(), torch.zeros(8), None), "float64, which the kernel does not support"),
    ],
    ids=["weight", "bias", "integer", "double"],
)
def test_bad_input_is_refused_before_launch(arguments: tuple[Tensor, Tensor, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_norm(*arguments, EPS)


def test_a_residual_that_does_not_fit_is_refused() -> None:
    w = torch.zeros(8)
    with pytest.raises(ValueError, match="they must agree"):
        add_layer_norm(torch.zeros(2, 8), torch.zeros(2, 8).half(), w, w, EPS)
