"""The batch-invariant product in the interpreter: values, gradients, strides, descriptors, and the bits of rows.

numpy's matrix product gives a row other bits at another place of a block (tensor cores do not, see tests/gpu), so bits
are compared for rows at the same place of their tile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.tools.tensor_descriptor import TensorDescriptor

from trine.kernels.invariant import op
from trine.kernels.invariant.configs import MATMUL
from trine.kernels.invariant.op import invariant_matmul, invariant_matmul_reference, invariant_product, launch_product
from trine.kernels.launch import launch
from trine.kernels.target import INTERPRETER
from trine.kernels.tuning import Config, force

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Rows, inner size, columns; tiles are of 16 rows, pieces of 16 numbers. Multiples of 8 go through descriptors.
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 16, 24), (33, 40, 72), (19, 23, 50), (70, 17, 33), (16, 64, 16)], ids=str
)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, *, bias: bool = True) -> list[Tensor]:
    rows, width, columns = shape
    tensors = [make(rows, width, dtype=dtype), make(columns, width, seed=1, dtype=dtype) / width**0.5]
    return [*tensors, make(columns, dtype=dtype, seed=2)] if bias else tensors


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@DTYPES
@SHAPES
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(compare: Any, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    tensors = operands(shape, dtype, bias=bias)
    compare.gradients("invariant_matmul", invariant_matmul, plain, tensors, exact=invariant_matmul_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_of_fp32(compare: Any, dtype: torch.dtype) -> None:
    x, weight, bias = operands((9, 24, 40))
    compare.gradients("invariant_matmul fp32 weights", invariant_matmul, plain, [x.to(dtype), weight, bias])


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("shape", [(21, 35, 50), (24, 40, 48)], ids=str)
@DTYPES
def test_orientations(
    compare: Any, shape: tuple[int, int, int], dtype: torch.dtype, a_transposed: bool, b_transposed: bool
) -> None:
    a, b = operands(shape, dtype, bias=False)
    found = launch_product(
        a.T.contiguous() if a_transposed else a,
        b.T.contiguous() if b_transposed else b,
        None,
        a_transposed=a_transposed,
        b_transposed=b_transposed,
    )
    compare.values("invariant_product", found, a @ b.T, a.double() @ b.double().T)


def described(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch has descriptors."""
    taken: list[bool] = []

    def watched(kernel: Any, grid: tuple[int, ...], config: Config, arguments: Any) -> None:
        taken.append(isinstance(arguments["a_ptr"], TensorDescriptor))
        assert taken[-1] == isinstance(arguments["b_ptr"], TensorDescriptor) == arguments["DESCRIBED"]
        launch(kernel, grid, config, arguments)

    monkeypatch.setattr(op, "launch", watched)
    return taken


def test_descriptors_and_pointers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = described(monkeypatch)
    x, weight, bias = operands((16, 40, 48))
    wide = torch.zeros(16, 51)
    wide[:, 3:43] = x
    a, b = invariant_matmul(x, weight, bias), invariant_matmul(wide[:, 3:43], weight, bias)
    narrow = torch.zeros(48, 41)
    narrow[:, :40] = weight
    c = invariant_matmul(x, narrow[:, :40], bias)
    assert taken == [True, False, False]
    assert torch.equal(a, b)
    assert torch.equal(a, c)


@DTYPES
def test_strides(compare: Any, dtype: torch.dtype) -> None:
    x, weight, bias = operands((20, 24, 32), dtype)
    expected = invariant_matmul(x, weight, bias)
    wide = torch.zeros(20, 48, dtype=dtype)
    wide[:, 8:32] = x
    for other in (wide[:, 8:32], x.T.contiguous().T, x.view(4, 5, 24)):
        found = invariant_matmul(other, weight.T.contiguous().T, bias.expand(2, 32)[1])
        assert torch.equal(found.reshape(20, 32), expected)
        assert found.shape[:-1] == other.shape[:-1]
    one = torch.ones(1, dtype=dtype)
    assert torch.equal(invariant_matmul(x, weight, one.expand(32)), invariant_matmul(x, weight, torch.ones_like(bias)))
    assert torch.equal(invariant_matmul(x[0], weight, bias), expected[0])
    leaf = x.clone().requires_grad_()
    y = invariant_matmul(leaf, weight, bias)
    compare.values("invariant_matmul", *(torch.autograd.grad(y.sum(), leaf)[0],), *gradients_of_a_sum(x, weight))


def gradients_of_a_sum(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient that `expand` hands down has strides of zero."""
    ones = torch.ones(len(x), len(weight), dtype=x.dtype)
    return ones @ weight, ones.double() @ weight.double()


@DTYPES
@pytest.mark.parametrize("shape", [(70, 40, 48), (70, 39, 47)], ids=["described", "pointers"])
def test_the_bits_of_a_row_do_not_depend_on_the_others(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = operands(shape, dtype)
    tile = Config({"ROWS": 16, "COLUMNS": 16, "BLOCK_K": 16, "GROUP": 2})
    with force({MATMUL.operation: tile}):
        together = invariant_matmul(x, weight, bias)
        for first in range(0, 70, 16):
            for count in (1, 2, 5, 16, 70):
                part = invariant_matmul(x[first : first + count], weight, bias)
                assert torch.equal(part, together[first : first + count]), (first, count)
        # Other rows, rows that are not numbers, other tiles that run at the same time.
        other = torch.full_like(x, float("nan"))
        other[17] = x[17]
        assert torch.equal(invariant_matmul(other, weight, bias)[17], together[17])
    with force({MATMUL.operation: Config({**tile.blocks, "GROUP": 5})}):
        assert torch.equal(invariant_matmul(x, weight, bias), together)


def test_both_tiles_are_taken() -> None:
    rows = {MATMUL.pick(torch.float32, INTERPRETER, M=m, N=40, K=16).blocks["COLUMNS"] for m in (1, 100)}
    assert rows == {16, 32}


def test_lines_far_apart(compare: Any) -> None:
    """Offsets within a tile past 2^31: of memory that is reserved only, and of which few pages are touched."""
    a, b = operands((9, 20, 40), torch.float16, bias=False)
    far = torch.empty(9, 2**28 + 1, dtype=torch.float16)
    far[:, -20:] = a
    found = launch_product(far[:, -20:], b, None)
    compare.values("invariant_product", found, a @ b.T, a.double() @ b.double().T)


def test_nothing_to_do() -> None:
    x, weight, bias = operands((4, 24, 32))
    assert invariant_matmul(x[:0], weight, bias).shape == (0, 32)
    assert invariant_matmul(x, weight[:0], bias[:0]).shape == (4, 0)
    assert torch.equal(invariant_matmul(x[:, :0], weight[:, :0], bias), bias.expand(4, 32))
    leaves = [x[:0].clone().requires_grad_(), weight.clone().requires_grad_()]
    invariant_matmul(*leaves).sum().backward()
    assert leaves[1].grad is not None
    assert (leaves[1].grad == 0).all()


def test_registration_compiling_and_checkpointing() -> None:
    tensors = [t.requires_grad_() for t in operands((20, 24, 32))]
    torch.library.opcheck(invariant_product, (*tensors, False, False))
    torch.library.opcheck(invariant_product, (tensors[0].detach().T, tensors[1].detach().T, None, True, True))
    expected = torch.autograd.grad(invariant_matmul(*tensors).square().sum(), tensors)
    compiled = torch.compile(invariant_matmul, fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda *t: checkpoint(invariant_matmul, *t, use_reentrant=False)):
        found = torch.autograd.grad(call(*tensors).square().sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_transposed_product_has_no_gradient() -> None:
    x, weight = (t.T.contiguous().requires_grad_() for t in operands((20, 24, 32), bias=False))
    y = invariant_product(x, weight, None, True, True)
    with pytest.raises(RuntimeError, match="a transposed product has no gradient"):
        y.sum().backward()
