"""Compiled products of few rows on the CPU: against float64, the choice of a path, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import compiled, matvec, table
from trine.kernels.cpu.matvec import compiled_codes_matvec, compiled_matvec, int8_codes_matvec, int8_matvec
from trine.kernels.cpu.projection import SHORTEST

SIZES = [(1, 1), (5, 31), (37, 123), (64, 256), (3, 4097)]
needs_numba = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "available", lambda: False)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def close(found: Tensor, exact: Tensor, eager: Tensor) -> None:
    """At most twice the error of the same computation by torch, or a rounding of the largest number."""
    assert found.dtype == eager.dtype
    error, allowed = (float((x.double() - exact).abs().max()) for x in (found, eager))
    assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * float(exact.abs().max())


@needs_numba
@pytest.mark.parametrize("rows", [1, 2, 3, 15])  # one, two, four and eight rows at once, and all in turn
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_as_exact_as_torchs(dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    x, w, bias = make(rows, k, dtype=dtype), make(n, k, dtype=dtype, seed=1), make(n, dtype=dtype, seed=2)
    for b in (None, bias):
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        close(compiled_matvec(x, w, None, b), exact, F.linear(x, w, b))
        close(matvec.matvec(x, w, b), exact, F.linear(x, w, b))


@needs_numba
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights_are_scaled_after_the_sum(dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    x, w, scales, bias = make(rows, k, dtype=dtype), codes(n, k), make(n, seed=3).abs(), make(n, seed=2)
    exact = F.linear(x.double(), w.double() * scales.double()[:, None], bias.double())
    eager = F.linear(x, (w.float() * scales[:, None]).to(dtype), bias.to(dtype))
    close(compiled_matvec(x, w, scales, bias), exact, eager)
    close(int8_matvec(x, w, scales, bias), exact, eager)


@needs_numba
@pytest.mark.parametrize("rows", [1, 3, 7, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (5, 31), (37, 123), (64, 256), (101, 200), (3, 4097)])
def test_products_of_codes_are_exact(n: int, k: int, rows: int) -> None:
    """Fewer outputs than are taken at once, and some left over; rows that are no whole blocks, or shorter than one."""
    x, w = codes(rows, k, seed=1), codes(n, k)
    x[0], w[0] = -128, -128
    exact = x.long() @ w.long().t()
    scales, x_scales, bias = make(n, seed=3).abs(), make(rows, seed=4).abs(), make(n, seed=5)
    if k >= SHORTEST:
        sums = compiled_codes_matvec(x, torch.ones(rows), w, torch.ones(n), None)
        assert torch.equal(sums, exact.float())
        half = compiled_codes_matvec(x, x_scales, w, scales, bias, torch.bfloat16)
        assert torch.equal(half, compiled_codes_matvec(x, x_scales, w, scales, bias).bfloat16())
    found = int8_codes_matvec(x, x_scales, w, scales, bias)
    wanted = exact.double() * x_scales.double()[:, None] * scales.double() + bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=3e-7, atol=1e-6)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bits_repeat_whatever_the_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    w = codes(67, 301) if dtype == torch.int8 else make(67, 301, dtype=dtype)
    scales = torch.rand(67) if dtype == torch.int8 else None
    x = make(3, 301, seed=1)
    results = []
    for number in (1, 2, 1):
        torch.set_num_threads(number)
        results.append(compiled_matvec(x, w, scales, None))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_numba
def test_codes_by_codes_have_the_same_bits_alone_and_with_more_threads(threads: None) -> None:
    """More outputs than a thread takes at once, rows that are taken by fours and alone."""
    x, w, scales, bias = codes(70, 200, seed=1), codes(101, 200), torch.rand(101), make(101)
    x_scales, results = torch.rand(70), []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(compiled_codes_matvec(x, x_scales, w, scales, bias))
    assert torch.equal(results[0], results[1])
    alone = compiled_codes_matvec(x[69:], x_scales[69:], w, scales, bias)
    assert torch.equal(alone, results[0][69:])


@needs_numba
def test_what_is_no_number_stays_so() -> None:
    w, x = make(9, 100, dtype=torch.bfloat16), make(1, 100, seed=1)
    w[2, 50], w[3, 7], w[4, 99] = float("nan"), float("inf"), 0.0
    y = compiled_matvec(x, w, None, None)[0]
    assert y.isnan().tolist() == [n == 2 for n in range(9)]
    assert y.isinf().tolist() == [n == 3 for n in range(9)]


@needs_numba
def test_rows_and_scales_may_lie_anywhere() -> None:
    x, w, bias = make(64, 6)[:, ::2].t(), make(5, 128)[:, ::2], make(10)[::2]
    torch.testing.assert_close(matvec.matvec(x, w, bias), F.linear(x, w, bias))
    torch.testing.assert_close(compiled_matvec(x, w.contiguous(), None, bias), F.linear(x, w, bias))


@pytest.mark.parametrize(("rows", "n", "k"), [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_nothing_gives_nothing(rows: int, n: int, k: int) -> None:
    x, w = make(rows, k), make(n, k)
    assert torch.equal(matvec.matvec(x, w), F.linear(x, w))
    assert torch.equal(int8_matvec(x, codes(n, k), torch.ones(n)), torch.zeros(rows, n))


def test_gradients_go_through_torch() -> None:
    x, w = make(1, 8).requires_grad_(), make(4, 8, seed=1)
    matvec.matvec(x, w).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], w.sum(dim=0))


@pytest.mark.usefixtures("no_numba")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_computes_the_same_where_numba_is_missing(dtype: torch.dtype) -> None:
    x, w, q, scales, bias = (
        make(2, 64, dtype=dtype),
        make(5, 64, dtype=dtype, seed=1),
        codes(5, 64),
        torch.rand(5),
        make(5),
    )
    assert not {table.choose(kind, 1) for kind in table.KINDS} & set(table.COMPILED)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for found, exact in (
        (matvec.matvec(x, w, bias.to(dtype)), F.linear(x.double(), w.double(), bias.to(dtype).double())),
        (int8_matvec(x, q, scales, bias), F.linear(x.double(), q.double() * scales.double()[:, None], bias.double())),
    ):
        assert float((found.double() - exact).abs().max()) <= bound * float(exact.abs().max())
    x_codes = codes(20, 64, seed=1)
    found = int8_codes_matvec(x_codes, torch.ones(20), q, scales, bias)
    exact = (x_codes.double() @ q.double().t()) * scales.double() + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matvec.matvec(make(1, 8), make(4, 9)), r"shapes \(1, 8\) and \(4, 9\); expected \[M, K\]"),
        (lambda: matvec.matvec(make(1, 8), make(4, 8), make(5)), r"bias has shape \(5,\); expected \(4,\)"),
        (lambda: matvec.matvec(make(1, 8).half(), make(4, 8)), "x is torch.float16; supported are float32"),
        (lambda: matvec.matvec(make(1, 8), codes(4, 8)), "weight is torch.int8; supported are float32"),
        (lambda: int8_matvec(make(1, 8), make(4, 8), make(4)), "codes are torch.float32; they must be int8"),
        (lambda: int8_matvec(make(1, 8), codes(4, 8), make(3)), r"scales are torch.float32 \(3,\)"),
        (lambda: int8_matvec(make(1, 8).double(), codes(4, 8), make(4)), "x is torch.float64"),
        (lambda: int8_codes_matvec(make(1, 8), make(1), codes(4, 8), make(4)), "x_codes is torch.float32"),
        (lambda: int8_codes_matvec(codes(1, 8), make(2), codes(4, 8), make(4)), r"x_scales is torch.float32 \(2,\)"),
        (
            lambda: int8_codes_matvec(codes(1, 140000), make(1), codes(1, 140000), make(1)),
            "rows have 140000 codes; sums of more than 131071",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
