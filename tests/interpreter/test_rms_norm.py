"""The RMSNorm kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_forward, rms_norm_reference
from trine.kernels.tuning import Config, force

# Rows of many blocks, as very wide ones are: three blocks of 16 numbers here.
WIDE = {
    "norm_forward": Config({"BLOCK_C": 16}),
    "norm_backward": Config({"ROWS": 2, "STAGES": 1, "BLOCK_C": 16}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> tuple[Tensor, ...]:
    total = x + residual
    return rms_norm_reference(total, weight, eps, unit_offset=unit_offset), total


def plain_first(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, 1e-6)


@DTYPES
@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "1+weight"])
@pytest.mark.parametrize("shape", [(1, 5), (5, 123), (2, 7, 64), (9, 1000), (3, 2, 5, 16)], ids=str)
def test_rms_norm(compare: Any, shape: tuple[int, ...], unit_offset: bool, dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype=dtype), make(shape[-1], dtype=torch.float32, seed=1)
    compare.gradients(
        "rms_norm",
        lambda x, w: rms_norm(x, w, 1e-6, unit_offset=unit_offset),
        lambda x, w: rms_norm_reference(x, w, 1e-6, unit_offset=unit_offset),
        inputs,
    )


@DTYPES
def test_add_rms_norm(compare: Any, dtype: torch.dtype) -> None:
    inputs = make(5, 123, dtype=dtype), make(5, 123, dtype=dtype, seed=2), make(123, dtype=dtype, seed=1)
    compare.gradients(
        "add_rms_norm",
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6, unit_offset=True),
        lambda x, r, w: add_reference(x, r, w, 1e-6, unit_offset=True),
        inputs,
    )


@DTYPES
def test_rows_of_many_blocks(compare: Any, dtype: torch.dtype) -> None:
    inputs = make(5, 41, dtype=dtype), make(5, 41, dtype=dtype, seed=2), make(41, dtype=torch.float32, seed=1)
    with force(WIDE):
        compare.gradients("rms_norm wide", lambda x, _, w: rms_norm(x, w, 1e-6), plain_first, inputs)
        compare.gradients(
            "add_rms_norm wide",
            lambda x, r, w: add_rms_norm(x, r, w, 1e-6, unit_offset=True),
            lambda x, r, w: add_reference(x, r, w, 1e-6, unit_offset=True),
            inputs,
        )


def test_blocks_of_a_row_change_nothing_but_rounding() -> None:
    x, w = make(3, 40, dtype=torch.float32).requires_grad_(), make(40, dtype=torch.float32, seed=1).requires_grad_()
    results = []
    for configs in ({}, WIDE):
        with force(configs):
            y = rms_norm(x, w, 1e-6)
            results.append((y, *torch.autograd.grad(y.sum(), (x, w))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_gradient_of_the_two_results_is_enough() -> None:
    for use in (0, 1):
        x, r = (make(5, 8, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(2))
        w = make(8, dtype=torch.float32, seed=3).requires_grad_()
        add_rms_norm(x, r, w, 1e-6)[use].sum().backward()
        mine = [None if t.grad is None else t.grad.clone() for t in (x, r, w)]
        for t in (x, r, w):
            t.grad = None
        add_reference(x, r, w, 1e-6, unit_offset=False)[use].sum().backward()
        for a, b in zip(mine, (x, r, w), strict=True):
            assert (a is None) == (b.grad is None)
            if a is not None:
                torch.testing.assert_close(a, b.grad)


def test_empty_and_strided_rows() -> None:
    weight = make(8, dtype=torch.float32)
    assert rms_norm(torch.empty(0, 8), weight, 1e-6).shape == (0, 8)
    x = make(6, 16, dtype=torch.float32)[::2, ::2]
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


def test_registration() -> None:
    x, w = make(5, 16, dtype=torch.float32).requires_grad_(), make(16, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(rms_norm_forward, (x, None, w, 1e-6, False))
    torch.library.opcheck(rms_norm_forward, (x, make(5, 16, dtype=torch.float32, seed=4), w, 1e-6, True))


def test_compiles_whole_and_under_checkpointing() -> None:
    x, w = make(5, 16, dtype=torch.float32).requires_grad_(), make(16, dtype=torch.float32).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return rms_norm(x, w, 1e-6).square()

    expected = torch.autograd.grad(function(x).sum(), x)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
    again = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(7), r"weight has shape \(7,\).*\[C\]"),
        (torch.zeros(2, 8, dtype=torch.int32), torch.zeros(8), "int32"),
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8), "float64, which the kernel does not support"),
    ],
    ids=["shape", "integer", "double"],
)
def test_bad_input_is_refused_before_launch(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-6)
