"""Newton-Schulz on a GPU at real sizes, against float64 and torch's products on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.newton_schulz import newton_schulz, newton_schulz_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(2, 2048, 2048), (1, 1024, 4096), (2, 3072, 768), (3, 100, 1000), (1, 1, 5), (5, 65, 63), (0, 8, 8)],
    ids=str,
)
def test_as_near_float64_as_torchs_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = make(*shape, dtype=dtype)
    found, plain, exact = newton_schulz(x), newton_schulz_reference(x), newton_schulz_reference(x.double())
    assert (found.shape, found.dtype) == (x.shape, dtype)
    if not x.numel():
        return
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (found, plain))
    floor = 8 * torch.finfo(dtype).eps * float(exact.square().mean().sqrt())
    assert float(ours) <= 2 * float(theirs) + floor
    assert torch.equal(newton_schulz(x), found)


@DTYPES
def test_singular_values_come_near_one(dtype: torch.dtype) -> None:
    values = torch.linalg.svdvals(newton_schulz(make(2, 512, 2048, dtype=dtype)).float())
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_matrices_of_a_batch_are_done_by_themselves() -> None:
    x = make(5, 192, 320, dtype=torch.bfloat16)
    x[3] = 0
    together = newton_schulz(x)
    assert not together[3].any()
    for place in range(5):
        torch.testing.assert_close(together[place], newton_schulz(x[place : place + 1])[0], rtol=2e-2, atol=2e-3)


def test_offsets_past_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    batch, rows, columns = 2**15 + 3, 64, 1024
    assert batch * rows * columns > 2**31
    x = torch.zeros(batch, rows, columns, device="cuda", dtype=torch.bfloat16)
    x[-2:] = make(2, rows, columns, dtype=torch.bfloat16)
    found = newton_schulz(x)
    assert not found[:-2].any()
    exact = newton_schulz_reference(x[-2:].double())
    assert float((found[-2:] - exact).square().mean().sqrt()) < 3e-2 * float(exact.square().mean().sqrt())


def test_one_matrix_past_2_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    rows, columns = 512, 2**22 + 64
    assert rows * columns > 2**31
    x = torch.zeros(1, rows, columns, device="cuda", dtype=torch.bfloat16)
    x[..., -rows:] = make(1, rows, rows, dtype=torch.bfloat16)
    found = newton_schulz(x, rounds=1)
    assert not found[..., :-rows].any()
    exact = newton_schulz_reference(x[..., -rows:].double(), rounds=1)
    assert float((found[..., -rows:] - exact).square().mean().sqrt()) < 3e-2 * float(exact.square().mean().sqrt())
