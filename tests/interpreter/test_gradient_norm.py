"""The kernels of the gradient norm in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.gradient_norm import gradient_norm, gradient_norm_forward, gradient_norm_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Chunks are of 1024 numbers, blocks of 256; a program adds four chunks at a time.
SHAPES = ((33, 65), (1,), (0, 3), (1024,), (3, 1024), (5, 7, 11), ())


def make(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plain(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    norms_T = torch.stack([x.float().square().sum().sqrt() for x in tensors])
    return norms_T.square().sum().sqrt(), norms_T


def check(compare: Any, tensors: list[Tensor]) -> None:
    for found, expected, exact in zip(
        gradient_norm(tensors), plain(tensors), gradient_norm_reference(tensors), strict=True
    ):
        compare.values("gradient_norm", found, expected, exact)


@DTYPES
def test_gradient_norm(compare: Any, dtype: torch.dtype) -> None:
    check(compare, make(SHAPES, dtype))
    check(compare, make(((7,),), dtype))


def test_dtypes_mixed_keep_their_places(compare: Any) -> None:
    halves, singles = make(SHAPES, torch.bfloat16), make(SHAPES, torch.float32)
    check(compare, [halves[0], singles[1], singles[4], halves[3], make(((9,),), torch.float16)[0], singles[0]])


def test_strided_and_misaligned_tensors(compare: Any) -> None:
    base = make(((40, 60),), torch.float32)[0]
    check(compare, [base.t(), base[::2, ::3], base.view(-1)[1:2000], base[3:7]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_norm_and_in_all(value: float) -> None:
    tensors = make(((2000,), (3,)), torch.float32)
    tensors[0][1999] = value
    total, norms_T = gradient_norm(tensors)
    assert torch.isfinite(norms_T).tolist() == [False, True]
    assert not torch.isfinite(total)


def test_no_numbers_at_all() -> None:
    total, norms_T = gradient_norm([torch.zeros(0), torch.zeros(3, 0)])
    assert (total.item(), norms_T.tolist()) == (0.0, [0.0, 0.0])


def test_two_runs_give_the_same_bits() -> None:
    tensors = make(SHAPES, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(gradient_norm(tensors), gradient_norm(tensors), strict=True))


def test_registration() -> None:
    torch.library.opcheck(gradient_norm_forward, (make(((5, 3), (7,)), torch.float32),))
    torch.library.opcheck(gradient_norm_forward, (make(((5, 3),), torch.bfloat16),))


def test_compiles_whole() -> None:
    tensors = make(((5, 3), (7,)), torch.float32)

    def function(x: Tensor, y: Tensor) -> Tensor:
        total, norms_T = gradient_norm([x, y])
        return total + norms_T

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))


def test_float64_is_refused_before_launch() -> None:
    with pytest.raises(ValueError, match=r"tensor 0 is torch\.float64"):
        gradient_norm([torch.zeros(3, dtype=torch.float64)])
