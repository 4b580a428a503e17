"""Rotary positions on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trine.kernels.rms_norm import rms_norm_reference
from trine.kernels.rope.op import rope, rope_heads, rope_reference, rope_tables

# Largest error over the largest exact value: one rounding of the result; with norms one more before the rotation.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 4.5e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
# B, T, H, K, D, R: Llama, Qwen3, GPT-J's part of a head, Phi's, Gemma's; sizes that are no powers of two.
SIZES = pytest.mark.parametrize(
    "sizes",
    [
        (2, 4096, 32, 8, 128, 64),
        (1, 2048, 16, 8, 64, 32),
        (1, 2048, 16, 16, 256, 32),
        (2, 1000, 32, 32, 80, 16),
        (1, 777, 8, 4, 256, 128),
        (3, 123, 5, 1, 12, 5),
        (2, 1, 32, 8, 128, 64),
    ],
    ids=str,
)
Sizes = tuple[int, int, int, int, int, int]


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def tables(B: int, T: int, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row of the batch begins at a position of its own."""
    frequencies = 10000.0 ** -(torch.arange(R, device="cuda") / R)
    positions_BT = torch.arange(T, device="cuda") + 1000 * torch.arange(B, device="cuda")[:, None]
    return rope_tables(positions_BT, frequencies, dtype)


def heads_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, interleaved: bool, weights: list[Tensor]
) -> tuple[Tensor, ...]:
    q, k, v = qkv.unflatten(-1, (H + 2 * K, -1)).split([H, K, K], dim=2)
    if weights:
        q, k = (rms_norm_reference(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True))
    q, k = (rope_reference(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def ours(
    qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, interleaved: bool, weights: list[Tensor]
) -> tuple[Tensor, ...]:
    q_weight, k_weight = weights or (None, None)
    return rope_heads(
        qkv, cos, sin, H, K, interleaved=interleaved, q_norm_weight=q_weight, k_norm_weight=k_weight, eps=1e-6
    )


def close(found: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    assert found.shape == exact.shape
    if exact.numel():
        largest = float(exact.abs().max())
        error = float((found.detach().double() - exact).abs().max())
        assert error <= roundings * BOUNDS[found.dtype] * largest, f"error {error:.2e}, largest value {largest:.2e}"


@DTYPES
@PAIRS
@SIZES
def test_rope(sizes: Sizes, interleaved: bool, dtype: torch.dtype) -> None:
    B, T, H, _, D, R = sizes
    x, dy = (make(B, T, H, D, seed=seed, dtype=dtype) for seed in (0, 1))
    cos, sin = tables(B, T, R, dtype)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = rope(x, cos, sin, interleaved=interleaved)
    expected = rope_reference(exact, cos.double(), sin.double(), interleaved=interleaved)
    close(y, expected.detach())
    close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, exact, dy.double())[0])


@DTYPES
@PAIRS
@SIZES
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
def test_rope_heads(sizes: Sizes, with_norms: bool, interleaved: bool, dtype: torch.dtype) -> None:
    B, T, H, K, D, R = sizes
    qkv = make(B, T, (H + 2 * K) * D, seed=0, dtype=dtype).requires_grad_()
    weights = [make(D, seed=seed).requires_grad_() for seed in (1, 2)] if with_norms else []
    cos, sin = tables(B, T, R, dtype)
    exact = [t.detach().double().requires_grad_() for t in (qkv, *weights)]
    found = ours(qkv, cos, sin, H, K, interleaved, weights)
    expected = heads_reference(exact[0], cos.double(), sin.double(), H, K, interleaved, exact[1:])
    grads = [make(*x.shape, seed=seed, dtype=dtype) for seed, x in enumerate(found, 3)]
    mine = torch.autograd.grad(found, [qkv, *weights], grads)
    theirs = torch.autograd.grad(expected, exact, [g.double() for g in grads])
    for a, b in zip((*found, *mine), (*expected, *theirs), strict=True):
        close(a, b.detach(), roundings=2.0)
    assert torch.equal(found[2], qkv.detach().unflatten(-1, (-1, D))[:, :, H + K :].transpose(1, 2))
    assert [x.dtype for x in mine[1:]] == [torch.float32] * len(weights)


@DTYPES
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    H, K, D = 32, 8, 128
    qkv = make(2, 5000, (H + 2 * K) * D, seed=0, dtype=dtype).requires_grad_()
    weights = [make(D, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2)]
    runs = []
    for _ in range(2):
        parts = ours(qkv, *tables(1, 5000, D // 2, dtype), H, K, False, weights)
        gradients = torch.autograd.grad(parts, [qkv, *weights], [torch.ones_like(x) for x in parts])
        runs.append([*parts, *gradients])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_gradients_in_any_layout_give_the_same_bits() -> None:
    H, K, D = 16, 4, 64
    qkv = make(2, 500, (H + 2 * K) * D, seed=0, dtype=torch.bfloat16).requires_grad_()
    parts = ours(qkv, *tables(1, 500, D // 2, torch.bfloat16), H, K, False, [])
    by_head = [make(*x.shape, seed=seed, dtype=torch.bfloat16) for seed, x in enumerate(parts, 3)]
    by_token = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in by_head]
    first, second = (torch.autograd.grad(parts, qkv, g, retain_graph=True)[0] for g in (by_head, by_token))
    assert torch.equal(first, second)


@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
def test_offsets_past_2_to_the_31(with_norms: bool) -> None:
    """More than 2^31 numbers; the last tokens are compared."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    H, K, D, R = 32, 8, 128, 64
    T = 2**31 // ((H + 2 * K) * D) + 77
    qkv = torch.zeros(1, T, (H + 2 * K) * D, device="cuda", dtype=torch.bfloat16)
    qkv[:, -100:] = make(1, 100, (H + 2 * K) * D, seed=0, dtype=torch.bfloat16)
    qkv.requires_grad_()
    weights = [make(D, seed=seed) for seed in (1, 2)] if with_norms else []
    cos, sin = tables(1, T, R, torch.bfloat16)
    found = ours(qkv, cos, sin, H, K, False, weights)
    grads = [torch.ones((), device="cuda", dtype=torch.bfloat16).expand_as(x) for x in found]
    (dqkv,) = torch.autograd.grad(found, qkv, grads)
    last = qkv.detach()[:, -100:].double().requires_grad_()
    angles = cos[:, -100:].double(), sin[:, -100:].double()
    expected = heads_reference(last, *angles, H, K, False, [w.double() for w in weights])
    (dlast,) = torch.autograd.grad(expected, last, [torch.ones_like(x) for x in expected])
    for a, b in zip(found, expected, strict=True):
        close(a[:, :, -100:], b.detach(), roundings=2.0)
    close(dqkv[:, -100:], dlast, roundings=2.0)


def test_keeps_no_activation_without_norms() -> None:
    H, K, D = 32, 8, 128
    cos, sin = tables(1, 4096, D // 2, torch.bfloat16)
    qkv = make(2, 4096, (H + 2 * K) * D, seed=0, dtype=torch.bfloat16).requires_grad_()
    ours(qkv, cos, sin, H, K, False, [])  # what a first call allocates for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    parts = ours(qkv * 1, cos, sin, H, K, False, [])
    kept = torch.cuda.memory_allocated() - before
    assert kept <= sum(x.nbytes for x in parts) + 2**20
