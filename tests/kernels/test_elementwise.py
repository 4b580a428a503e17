"""Norms, rotation and gated units against float64: values and gradients, odd shapes, mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trine.kernels.layer_norm import layer_norm, layer_norm_reference
from trine.kernels.mlp.activation import ACTIVATIONS, gated, gated_joined, gated_reference
from trine.kernels.rms_norm import rms_norm, rms_norm_reference
from trine.kernels.rope.op import rope, rope_heads, rope_reference, rope_tables

SHAPES = [(3, 5), (2, 7, 123), (1, 1, 64), (4, 33, 2, 16), (0, 8)]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _check(ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor], tolerance: float) -> None:
    """Value and gradients of `ours` on `inputs` against `exact` on the same numbers in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, y64 = ours(*leaves), exact(*wide)
    assert y.dtype == inputs[0].dtype
    direction = _randn(*y.shape, seed=9).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, direction)
    gradients64 = torch.autograd.grad(y64, wide, direction.double())
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), y, rtol=0, atol=tolerance)  # without gradients: the same numbers
    for one, two in zip((y, *gradients), (y64, *gradients64), strict=True):
        scale = max(1.0, float(two.detach().abs().max())) if two.numel() else 1.0
        torch.testing.assert_close(one.double(), two, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, weight = _randn(*shape).to(dtype), 1 + 0.3 * _randn(shape[-1], seed=1)
    _check(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), [x, weight], tolerance)


def test_rms_norm_of_a_view() -> None:
    x = _randn(4, 6, 24)[:, :, 8:16]
    weight = _randn(8, seed=1)
    _check(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, weight], 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    x, weight, bias = _randn(*shape).to(dtype), 1 + 0.3 * _randn(shape[-1], seed=1), _randn(shape[-1], seed=2)
    if biased:
        _check(
            lambda x, w, b: layer_norm(x, w, b, 1e-5),
            lambda x, w, b: layer_norm_reference(x, w, b, 1e-5),
            [x, weight, bias],
            tolerance,
        )
    else:
        _check(
            lambda x, w: layer_norm(x, w, None, 1e-5),
            lambda x, w: layer_norm_reference(x, w, None, 1e-5),
            [x, weight],
            tolerance,
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 1, 2), (2, 5, 3, 6), (2, 33, 4, 64)])
def test_rope(B: int, T: int, H: int, D: int, dtype: torch.dtype, tolerance: float) -> None:
    inv_freq = 1.0 / (10_000.0 ** (torch.arange(0, D, 2) / D))
    positions = torch.arange(T).repeat(B, 1) + torch.arange(B)[:, None]
    cos, sin = rope_tables(positions, inv_freq, dtype)
    _check(
        lambda x: rope(x, cos, sin),
        lambda x: rope_reference(x, cos.double(), sin.double()),
        [_randn(B, T, H, D).to(dtype)],
        tolerance,
    )


def test_rope_scores_depend_on_the_distance_alone() -> None:
    inv_freq = 1.0 / (10_000.0 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    q, k = _randn(1, 1, 1, 8).double(), _randn(1, 1, 1, 8, seed=1).double()

    def score(q_position: int, k_position: int) -> Tensor:
        tables = [rope_tables(torch.tensor([[p]]), inv_freq, torch.float64) for p in (q_position, k_position)]
        return (rope(q, *tables[0]) * rope(k, *tables[1])).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102))
    assert abs(float(score(5, 2) - score(6, 2))) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape: tuple[int, ...], activation: str, dtype: torch.dtype, tolerance: float) -> None:
    gate, up = _randn(*shape).to(dtype), _randn(*shape, seed=1).to(dtype)
    _check(lambda g, u: gated(g, u, activation), lambda g, u: gated_reference(g, u, activation), [gate, up], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_joined(activation: str, dtype: torch.dtype, tolerance: float) -> None:
    joined = _randn(4, 7, 24).to(dtype)
    _check(
        lambda x: gated_joined(x, activation),
        lambda x: gated_reference(x[..., :12], x[..., 12:], activation),
        [joined],
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2)])
def test_rope_heads(H: int, K: int, dtype: torch.dtype, tolerance: float) -> None:
    B, T, D = 2, 33, 8
    cos, sin = rope_tables(torch.arange(T)[None], 1.0 / (10_000.0 ** (torch.arange(0, D, 2) / D)), dtype)

    def exact(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(B, T, -1, D).split([H, K, K], dim=2)
        tables = cos.double(), sin.double()
        return torch.cat([rope_reference(q, *tables), rope_reference(k, *tables), v], dim=2).transpose(1, 2)

    joined = _randn(B, T, (H + 2 * K) * D).to(dtype)
    _check(lambda x: torch.cat(rope_heads(x, cos, sin, H, K), dim=1), exact, [joined], tolerance)


def test_mixed_dtypes_are_refused() -> None:
    x = _randn(2, 4)
    with pytest.raises(ValueError, match="gate is"):
        gated(x, x.double(), "silu")
    with pytest.raises(ValueError, match="cos and sin"):
        rope(x[None, :, None], x[None, :, :2].double(), x[None, :, :2].double())
