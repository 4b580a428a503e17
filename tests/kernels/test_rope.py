"""Rotary positions on the CPU, what they refuse, and the launch configurations of their kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trine.kernels.rms_norm import rms_norm_reference
from trine.kernels.rope import normed, rotation
from trine.kernels.rope.op import rope, rope_heads, rope_reference, rope_tables
from trine.kernels.target import COMPILED, INTERPRETER, Target

PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
SIZES = pytest.mark.parametrize(("D", "R"), [(16, 8), (10, 5), (16, 3), (8, 0)], ids=str)


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(T: int, R: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(R, dtype=torch.float64) / max(1, R))
    return rope_tables(torch.arange(T)[None], frequencies, dtype)


def heads_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, interleaved: bool, weights: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    q, k, v = qkv.unflatten(-1, (H + 2 * K, -1)).split([H, K, K], dim=2)
    if weights:
        q, k = (rms_norm_reference(x, w, 1e-6, unit_offset=True) for x, w in zip((q, k), weights, strict=True))
    q, k = (rope_reference(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@PAIRS
def test_pairs_are_turned_as_complex_numbers(interleaved: bool) -> None:
    T, D, R = 5, 12, 4
    x = make(1, T, 2, D)
    turned = x[..., : 2 * R]
    z = torch.complex(turned[..., ::2], turned[..., 1::2]) if interleaved else torch.complex(*turned.chunk(2, dim=-1))
    angles = torch.arange(T)[:, None] * 100.0 ** -(torch.arange(R, dtype=torch.float64) / R)
    z = z * torch.polar(torch.ones(T, R, dtype=torch.float64), angles)[None, :, None]
    pair = (z.real, z.imag)
    expected = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    y = rope(x, *tables(T, R), interleaved=interleaved)
    torch.testing.assert_close(y[..., : 2 * R], expected)
    assert torch.equal(y[..., 2 * R :], x[..., 2 * R :])


@PAIRS
@SIZES
def test_rope_is_its_reference_in_float64(D: int, R: int, interleaved: bool) -> None:
    x = make(2, 5, 3, D).requires_grad_()
    y, expected = (f(x, *tables(5, R), interleaved=interleaved) for f in (rope, rope_reference))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((r * make(2, 5, 3, D, seed=1)).sum(), x)[0] for r in (y, expected))
    )


@PAIRS
@SIZES
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
def test_rope_heads_is_its_reference_in_float64(D: int, R: int, interleaved: bool, with_norms: bool) -> None:
    B, T, H, K = 2, 5, 4, 2
    qkv = make(B, T, (H + 2 * K) * D).requires_grad_()
    weights = tuple(make(D, seed=seed).requires_grad_() for seed in (1, 2)) if with_norms else ()
    q, k = weights or (None, None)
    found = rope_heads(
        qkv, *tables(T, R), H, K, interleaved=interleaved, q_norm_weight=q, k_norm_weight=k, unit_offset=True
    )
    expected = heads_reference(qkv, *tables(T, R), H, K, interleaved, weights)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(
            sum(((x * make(*x.shape, seed=9)).sum() for x in parts), qkv.new_zeros(())), (qkv, *weights)
        )
        for parts in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_angles_are_those_of_each_row() -> None:
    x = make(2, 3, 1, 4)
    positions_BT = torch.tensor([[0, 1, 2], [7, 8, 9]])
    cos, sin = rope_tables(positions_BT, torch.tensor([1.0, 0.1], dtype=torch.float64), torch.float64)
    assert math.isclose(float(cos[1, 2, 0]), math.cos(9.0))
    y = rope(x, cos, sin)
    for row in range(2):
        torch.testing.assert_close(y[row : row + 1], rope(x[row : row + 1], cos[row : row + 1], sin[row : row + 1]))


def test_bad_input_is_refused() -> None:
    cos, sin = tables(5, 4, torch.float32)
    qkv, w = torch.zeros(2, 5, 32), torch.ones(8)
    with pytest.raises(ValueError, match=r"x has shape \(5, 1, 8\)"):
        rope(torch.zeros(5, 1, 8), cos, sin)
    with pytest.raises(ValueError, match=r"x is torch.float16 but cos and sin are torch.float32"):
        rope(torch.zeros(1, 5, 1, 8).half(), cos, sin)
    with pytest.raises(ValueError, match="8 channels but a head has 6"):
        rope(torch.zeros(1, 5, 1, 6), cos, sin)
    with pytest.raises(ValueError, match=r"expected \[1 or 1, 4, R\]"):
        rope(torch.zeros(1, 4, 1, 8), cos, sin)
    with pytest.raises(ValueError, match="for 3 heads and 2 key-value heads"):
        rope_heads(qkv, cos, sin, 3, 2)
    with pytest.raises(ValueError, match="both or neither"):
        rope_heads(qkv, cos, sin, 2, 1, k_norm_weight=w)
    with pytest.raises(ValueError, match=r"k_norm_weight is torch.float32 \(7,\)"):
        rope_heads(qkv, cos, sin, 2, 1, q_norm_weight=w, k_norm_weight=w[:7])
    with pytest.raises(ValueError, match=r"q_norm_weight is torch\.int64"):
        rope_heads(qkv, cos, sin, 2, 1, q_norm_weight=w.long(), k_norm_weight=w)


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_configurations_cover_a_head(dtype: torch.dtype, target: Target) -> None:
    for D, R in ((2, 1), (64, 32), (80, 16), (96, 48), (128, 64), (256, 128), (256, 0), (512, 256)):
        for tunable in (rotation.FORWARD, normed.BACKWARD):
            shape = {"N": 8192 * 40, "exact_D": D, "exact_R": R}
            config = tunable.pick(dtype, target, **shape)
            candidates = tunable.candidates(shape, dtype, target)
            for blocks in (config.blocks, *(candidate.blocks for candidate in candidates)):
                assert all(size & (size - 1) == 0 for name, size in blocks.items() if name != "STAGES")
                assert blocks["BLOCK_R"] >= R
                assert blocks["BLOCK_P"] >= D - 2 * R
            if not target.interpreted and 64 <= D <= 256:
                assert candidates
                # Between 8 and 64 numbers a thread: 16 bytes at a time, and registers enough.
                assert 1024 <= config.blocks["ROWS"] * D <= 8192
