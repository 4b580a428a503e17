"""The feed-forward kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.mlp.activation import ACTIVATIONS, activate
from trine.kernels.mlp.op import GATED_ACTIVATIONS, gated_mlp, gated_mlp_reference, mlp, mlp_forward, mlp_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Tokens, width, feed-forward width; blocks are of 16, and two rows of tiles form a group.
SHAPES = pytest.mark.parametrize("shape", [(1, 5, 3), (16, 16, 16), (17, 33, 15), (40, 7, 35)], ids=str)
LIMIT = 0.9
NAMES = ("gate_bias", "up_bias", "down_bias")


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, weights: torch.dtype | None = None, *, bias: bool = False
) -> tuple[Tensor, ...]:
    """x, gate, up and down weights, and the three biases."""
    n, c, f = shape
    kind = weights or dtype
    made = [make(n, c, dtype=dtype)]
    made += [make(*s, dtype=kind, seed=i) / s[1] ** 0.5 for i, s in enumerate(((f, c), (f, c), (c, f)), 1)]
    made += [make(*s, dtype=kind, seed=i) for i, s in enumerate(((f,), (f,), (c,)), 4)] if bias else []
    return tuple(made)


def limit_of(activation: str) -> float | None:
    return LIMIT if activation == "swiglu_clamped" else None


def plain_unit(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, activation) * up


def plain_linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def plain_gated(x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, *biases: Tensor, activation: str) -> Tensor:
    bg, bu, bd = biases or (None, None, None)
    return plain_linear(plain_unit(plain_linear(x, wg, bg), plain_linear(x, wu, bu), activation), wd, bd)


def ours_gated(x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, *biases: Tensor, activation: str) -> Tensor:
    named = dict(zip(NAMES, biases, strict=False))
    return gated_mlp(x, wg, wu, wd, activation=activation, limit=limit_of(activation), **named)


def check(compare: Any, activation: str, tensors: tuple[Tensor, ...]) -> None:
    compare.gradients(
        "gated_mlp",
        lambda *t: ours_gated(*t, activation=activation),
        lambda *t: plain_gated(*t, activation=activation),
        tensors,
    )


@SHAPES
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated_mlp(compare: Any, activation: str, shape: tuple[int, int, int]) -> None:
    check(compare, activation, inputs(shape, torch.float32, bias=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated_mlp_in_half_precision(compare: Any, activation: str, dtype: torch.dtype) -> None:
    check(compare, activation, inputs((17, 33, 35), dtype, bias=activation != "silu"))


@DTYPES
def test_weights_of_another_dtype(compare: Any, dtype: torch.dtype) -> None:
    other = torch.float16 if dtype == torch.float32 else torch.float32
    tensors = inputs((17, 20, 18), dtype, other, bias=True)
    check(compare, "silu", tensors)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_mlp(compare: Any, bias: bool, activation: str, dtype: torch.dtype) -> None:
    x, _, wu, wd, *biases = inputs((18, 21, 33), dtype, bias=bias)

    def ours(x: Tensor, wu: Tensor, wd: Tensor, bu: Tensor | None = None, bd: Tensor | None = None) -> Tensor:
        return mlp(x, wu, wd, activation=activation, up_bias=bu, down_bias=bd)

    def plain(x: Tensor, wu: Tensor, wd: Tensor, bu: Tensor | None = None, bd: Tensor | None = None) -> Tensor:
        return plain_linear(activate(plain_linear(x, wu, bu), activation), wd, bd)

    compare.gradients("mlp", ours, plain, (x, wu, wd, *biases[1:]))


def test_clamp_cuts_both_sides() -> None:
    x, wg, wu, wd = inputs((17, 20, 18), torch.float32)
    gate, up = x @ wg.T, x @ wu.T
    assert (gate > LIMIT).any()
    assert (gate < -LIMIT).any()
    assert (up > LIMIT).any()
    assert (up < -LIMIT).any()
    expected = gated_mlp_reference(x, wg, wu, wd, activation="swiglu_clamped", limit=LIMIT)
    torch.testing.assert_close(expected, plain_gated(x, wg, wu, wd, activation="swiglu_clamped"))


def test_leading_dimensions_and_strides() -> None:
    x, wg, wu, wd = inputs((30, 10, 18), torch.float32)
    expected = gated_mlp_reference(x, wg, wu, wd, activation="silu")
    wide = torch.zeros(2, 15, 20)
    wide[..., ::2] = x.view(2, 15, 10)
    strided = [w.t().contiguous().t() for w in (wg, wu, wd)]
    found = gated_mlp(wide[..., ::2], *strided, activation="silu")
    torch.testing.assert_close(found, expected.view(2, 15, 10))
    one = gated_mlp(x[3], wg, wu, wd, activation="silu")
    torch.testing.assert_close(one, expected[3])
    x, _, wu, wd = inputs((4, 10, 18), torch.float32)
    torch.testing.assert_close(
        mlp(x.view(2, 2, 10), wu, wd, activation="gelu"), mlp_reference(x, wu, wd, activation="gelu").view(2, 2, 10)
    )


@pytest.mark.parametrize("shape", [(0, 8, 16), (3, 8, 0), (0, 8, 0), (3, 0, 5)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    n, c, f = shape
    sizes = ((n, c), (f, c), (f, c), (c, f), (f,), (f,), (c,))
    tensors = [make(*size, dtype=torch.float32, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    y = ours_gated(*tensors, activation="silu")
    assert y.shape == (n, c)
    torch.testing.assert_close(y, plain_gated(*tensors, activation="silu"))
    mine = torch.autograd.grad(y.sum(), tensors)
    for a, b in zip(mine, torch.autograd.grad(plain_gated(*tensors, activation="silu").sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_nan_and_infinity_travel() -> None:
    tensors = inputs((3, 8, 16), torch.float32)
    tensors[0][1, 2] = float("nan")
    for activation in GATED_ACTIVATIONS:
        y = ours_gated(*tensors, activation=activation)
        assert torch.isnan(y[1]).all(), activation
        assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("gate", [True, False], ids=["gated", "plain"])
def test_saves_only_what_it_was_given(gate: bool) -> None:
    x, wg, wu, wd = (t.requires_grad_() for t in inputs((17, 8, 64), torch.float32))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = gated_mlp(x, wg, wu, wd, activation="silu") if gate else mlp(x, wu, wd, activation="gelu")
    given = [x, wg, wu, wd] if gate else [x, wu, wd]
    assert {t.untyped_storage().data_ptr() for t in saved} <= {t.untyped_storage().data_ptr() for t in given}
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in given)
    y.sum().backward()


def test_only_needed_gradients_are_computed() -> None:
    tensors = inputs((17, 8, 18), torch.float32, bias=True)
    full = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(ours_gated(*full, activation="silu").square().sum(), full)
    for place, gradient in enumerate(expected):
        some = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
        y = ours_gated(*some, activation="silu")
        assert torch.equal(torch.autograd.grad(y.square().sum(), some[place])[0], gradient)


def test_registration() -> None:
    x, wg, wu, wd, bg, bu, bd = (t.requires_grad_() for t in inputs((5, 8, 18), torch.float32, bias=True))
    torch.library.opcheck(mlp_forward, (x, wg, wu, wd, bg, bu, bd, "silu", None))
    torch.library.opcheck(mlp_forward, (x, None, wu, wd, None, None, bd, "gelu", None))
    torch.library.opcheck(mlp_forward, (x, wg, wu, wd.detach(), None, None, None, "swiglu_clamped", 7.0))


def test_compiles_whole_and_under_checkpointing() -> None:
    x, *weights = (t.requires_grad_() for t in inputs((5, 8, 18), torch.float32))

    def function(x: Tensor) -> Tensor:
        return ours_gated(x[None], *weights, activation="silu").square()

    expected = torch.autograd.grad(function(x).sum(), x)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], expected)
    again = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)


def test_float64_is_refused_before_launch() -> None:
    x, wg, wu, wd = inputs((2, 4, 6), torch.float64)
    with pytest.raises(ValueError, match="float64 is not supported"):
        gated_mlp(x, wg, wu, wd, activation="silu")
    with pytest.raises(ValueError, match="float64 is not supported"):
        mlp(x, wu, wd, activation="gelu")
