"""The Newton-Schulz kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.newton_schulz import (
    launch_apply,
    launch_symmetric,
    newton_schulz,
    newton_schulz_forward,
    newton_schulz_reference,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_mirrored(x: Tensor) -> None:
    """Tiles of 16 below the diagonal are those above; those on it are computed whole."""
    tiles = torch.arange(x.shape[1]) // 16
    above = tiles[:, None] < tiles
    assert torch.equal(x[:, above], x.mT[:, above])
    torch.testing.assert_close(x, x.mT)


# Tiles are of 16; three by three tiles of rows are six on and above the diagonal.
@DTYPES
@pytest.mark.parametrize("shape", [(1, 16, 32), (2, 48, 16)], ids=str)
def test_symmetric_product(compare: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = make(*shape, dtype=dtype)
    found = launch_symmetric(x)
    compare.values("newton_schulz x x'", found, x @ x.mT, x.double() @ x.double().mT)
    assert_mirrored(found)


@DTYPES
def test_symmetric_product_with_sum(compare: Any, dtype: torch.dtype) -> None:
    a = make(2, 48, 48, dtype=torch.float32) / 7
    a = (a + a.mT).to(dtype)
    found = launch_symmetric(a, (-4.775, 2.0315))
    plain = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
    exact = -4.775 * a.double() + 2.0315 * a.double() @ a.double()
    compare.values("newton_schulz b a + c a a", found, plain, exact)
    assert_mirrored(found)


@DTYPES
def test_apply(compare: Any, dtype: torch.dtype) -> None:
    p, x = make(2, 48, 48, dtype=dtype) / 7, make(2, 48, 32, dtype=dtype, seed=1)
    plain = torch.baddbmm(x, p, x, beta=3.4445)
    compare.values(
        "newton_schulz a x + p x", launch_apply(p, x, 3.4445), plain, 3.4445 * x.double() + p.double() @ x.double()
    )


@DTYPES
@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 20, 37), (2, 37, 20), (1, 1, 5)], ids=str)
def test_newton_schulz(compare: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    # Well conditioned, so that five rounds do not magnify errors of rounding at random.
    x = make(*shape, dtype=torch.float32)
    x = (x + 2 * torch.eye(*shape[1:]) * shape[2] ** 0.5).to(dtype)
    found = newton_schulz(x)
    compare.values("newton_schulz", found, newton_schulz_reference(x), newton_schulz_reference(x.double()))


def test_strides_batches_and_zeros() -> None:
    x = make(2, 16, 18, dtype=torch.float32)
    wide = torch.zeros(2, 16, 36)
    wide[..., ::2] = x
    expected = newton_schulz(x, rounds=2)
    for found in (wide[..., ::2], x.mT.contiguous().mT):
        torch.testing.assert_close(newton_schulz(found, rounds=2), expected)
    torch.testing.assert_close(newton_schulz(x.mT, rounds=2), expected.mT)
    torch.testing.assert_close(newton_schulz(x[1:2], rounds=2), expected[1:2])
    assert not newton_schulz(torch.zeros(2, 5, 6), rounds=1).any()
    for shape in ((0, 4, 4), (2, 0, 5), (2, 5, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape
    torch.testing.assert_close(newton_schulz(x, rounds=0), newton_schulz_reference(x, rounds=0))


def test_registration() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(newton_schulz_forward, (make(1, 5, 7, dtype=dtype), 1))
    torch.library.opcheck(newton_schulz_forward, (make(1, 7, 5, dtype=torch.float32).mT, 1))


def test_compiles_whole() -> None:
    x = make(1, 7, 5, dtype=torch.float32)
    compiled = torch.compile(lambda x: newton_schulz(x, rounds=1) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), newton_schulz(x, rounds=1) + 1)


def test_bad_input_is_refused_before_launch() -> None:
    with pytest.raises(ValueError, match=r"update is torch\.float64; supported are"):
        newton_schulz(torch.zeros(1, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="may be at most 8388608"):
        newton_schulz(torch.zeros(1, 1, 1).expand(1, 1, 2**23 + 1))
