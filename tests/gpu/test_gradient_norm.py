"""Norms of many tensors on a GPU, against float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.gradient_norm import gradient_norm, gradient_norm_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LAYER = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (2048,), (5,), (3, 4097), (0, 3))


def make(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


@DTYPES
def test_norms_are_those_of_float64(dtype: torch.dtype) -> None:
    tensors = make(LAYER * 8, dtype)
    (total, norms_T), (exact, exact_T) = gradient_norm(tensors), gradient_norm_reference(tensors)
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_T.double(), exact_T, rtol=1e-6, atol=0)
    again = gradient_norm(tensors)
    assert torch.equal(again[0], total)
    assert torch.equal(again[1], norms_T)


def test_dtypes_mixed_and_tensors_askew() -> None:
    base = make(((3000, 1001),), torch.float32)[0]
    tensors = [base.bfloat16(), base.view(-1)[1:], base.t(), base[::2, ::3].half(), base[:7]]
    (total, norms_T), (exact, exact_T) = gradient_norm(tensors), gradient_norm_reference(tensors)
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_T.double(), exact_T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_norm_and_in_all(value: float) -> None:
    tensors = make(LAYER, torch.bfloat16)
    tensors[2][8191, 2047] = value
    total, norms_T = gradient_norm(tensors)
    assert torch.isfinite(norms_T).tolist() == [place != 2 for place in range(len(LAYER))]
    assert not torch.isfinite(total)


def test_offsets_past_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    x = torch.zeros(2**31 + 70000, device="cuda", dtype=torch.bfloat16)
    x[-1], x[2**31 + 1], x[0] = 3.0, 4.0, 12.0
    total, norms_T = gradient_norm([x])
    assert (total.item(), norms_T.tolist()) == (13.0, [13.0])
