"""Plain linear layers on the CPU: both forms of a kept weight against float64, the choice, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 31), (37, 123), (64, 256)])
def test_products_are_as_exact_as_torchs(
    n: int, k: int, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "prefers_packed", lambda dtype: packed)
    w, bias = make(n, k, dtype=dtype), make(n, dtype=dtype, seed=1)
    kept = linear.keep_linear(w)
    assert kept.packed == packed
    assert torch.equal(kept.plain(), w)
    for rows in (1, 2, 7, 40):
        x = make(rows, k, dtype=dtype, seed=2)
        for b in (None, bias):
            exact = F.linear(x.double(), w.double(), None if b is None else b.double())
            found, eager = linear.linear(x, kept, b), F.linear(x, w, b)
            assert found.dtype == dtype
            error, allowed = (float((y.double() - exact).abs().max()) for y in (found, eager))
            # Products may be added one by one, whose roundings grow as the root of their number.
            floor = torch.finfo(dtype).eps * (k**0.5 if dtype == torch.float32 else 1)
            assert error <= 2 * allowed + floor * float(exact.abs().max())


@DTYPES
def test_the_form_is_the_one_that_is_fastest_most_often(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "can_pack", lambda dtype: True)
    for path, packed in (("packed", True), ("loops", False), ("torch", False)):
        monkeypatch.setattr(linear, "choose", lambda kind, rows, among, path=path: path)
        assert linear.prefers_packed(dtype) == packed
    monkeypatch.setattr(linear, "choose", lambda kind, rows, among: "packed" if rows > 2 else "loops")
    assert linear.prefers_packed(dtype)
    monkeypatch.setattr(linear, "can_pack", lambda dtype: False)
    assert not linear.prefers_packed(dtype)


@pytest.mark.parametrize(("rows", "n", "k"), [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_gives_nothing(rows: int, n: int, k: int) -> None:
    assert torch.equal(linear.linear(make(rows, k), linear.keep_linear(make(n, k))), torch.zeros(rows, n))


def test_what_does_not_fit_is_refused() -> None:
    kept = linear.keep_linear(make(4, 8))
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        linear.keep_linear(make(4, 8).half())
    with pytest.raises(ValueError, match="weight requires a gradient"):
        linear.keep_linear(make(4, 8).requires_grad_())
    with pytest.raises(ValueError, match=r"x is torch.float32 \(1, 9\); expected torch.float32 \[M, 8\]"):
        linear.linear(make(1, 9), kept)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        linear.linear(make(1, 8).bfloat16(), kept)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); expected \(4,\)"):
        linear.linear(make(1, 8), kept, make(5))
    with pytest.raises(ValueError, match="requires a gradient"):
        linear.linear(make(1, 8).requires_grad_(), kept)
