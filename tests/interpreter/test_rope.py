"""The rotary kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.rms_norm import rms_norm_reference
from trine.kernels.rope.op import rope, rope_heads, rope_heads_forward, rope_reference, rope_rotate

# (D, R, dtype): whole heads, part of a head, sizes that are no powers of two, nothing turned.
CASES = pytest.mark.parametrize(
    ("D", "R", "dtype"),
    [
        (16, 8, torch.float32),
        (10, 5, torch.float32),
        (16, 3, torch.float32),
        (8, 0, torch.float32),
        (16, 8, torch.bfloat16),
        (10, 3, torch.float16),
    ],
    ids=str,
)
PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(B: int, T: int, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = 3 * torch.rand(B, T, R, generator=torch.Generator().manual_seed(7))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def heads_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, interleaved: bool, weights: tuple[Tensor, ...], offset: bool
) -> tuple[Tensor, ...]:
    cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
    q, k, v = qkv.unflatten(-1, (H + 2 * K, -1)).split([H, K, K], dim=2)
    if weights:
        q, k = (rms_norm_reference(x, w, 1e-6, unit_offset=offset) for x, w in zip((q, k), weights, strict=True))
    q, k = (rope_reference(x, cos, sin, interleaved=interleaved) for x in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@CASES
@PAIRS
def test_rope(compare: Any, D: int, R: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = tables(2, 5, R, dtype)
    compare.gradients(
        "rope",
        lambda x: rope(x, cos, sin, interleaved=interleaved),
        lambda x: rope_reference(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=interleaved),
        [make(2, 5, 3, D, dtype=dtype)],
    )


@CASES
@PAIRS
@pytest.mark.parametrize("norm", ["plain", "norm", "1+norm"])
def test_rope_heads(compare: Any, D: int, R: int, interleaved: bool, norm: str, dtype: torch.dtype) -> None:
    H, K, offset = 5, 2, norm == "1+norm"
    cos, sin = tables(1 if offset else 2, 7, R, dtype)
    weights = [make(D, dtype=torch.float32, seed=seed) for seed in (1, 2)] if norm != "plain" else []

    def ours(qkv: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        q, k = w or (None, None)
        options = {"q_norm_weight": q, "k_norm_weight": k, "unit_offset": offset}
        return rope_heads(qkv, cos, sin, H, K, interleaved=interleaved, **options)  # type: ignore[arg-type]

    def plain(qkv: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        return heads_reference(qkv, cos, sin, H, K, interleaved, w, offset)

    compare.gradients(f"rope_heads {norm}", ours, plain, [make(2, 7, (H + 2 * K) * D, dtype=dtype), *weights])


@pytest.mark.parametrize("T", [1, 5])
def test_heads_lie_by_token_and_gradients_may_lie_anyhow(T: int) -> None:
    cos, sin = tables(1, T, 4, torch.float32)
    qkv = make(2, T, 32, dtype=torch.float32).requires_grad_()
    q, k, v = rope_heads(qkv, cos, sin, 2, 1)
    for x in (q, k, v):
        assert x.transpose(1, 2).is_contiguous()
        assert x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    parts = [make(*x.shape, dtype=torch.float32, seed=seed) for seed, x in enumerate((q, k, v), 3)]
    by_token = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in parts]
    spread = [torch.stack((g, g), dim=-1)[..., 0] for g in parts]
    expected, *others = (
        torch.autograd.grad((q, k, v), qkv, grads, retain_graph=True)[0] for grads in (parts, by_token, spread)
    )
    assert all(torch.equal(other, expected) for other in others)
    reference = heads_reference(qkv, cos, sin, 2, 1, False, (), False)
    torch.testing.assert_close(expected, torch.autograd.grad(reference, qkv, parts)[0])


@pytest.mark.parametrize("T", [1, 5])
def test_parts_of_a_joined_product_are_turned_where_they_lie(T: int) -> None:
    cos, sin = tables(2, T, 4, torch.float32)
    q, k, _ = make(2, T, 32, dtype=torch.float32).unflatten(-1, (4, 8)).split([2, 1, 1], dim=2)
    # The last one is contiguous, yet its stride of tokens is not the size of a token.
    for x in (q, k, make(2, 2, T, 8, dtype=torch.float32).transpose(1, 2)):
        torch.testing.assert_close(rope(x, cos, sin), rope_reference(x, cos, sin))


def test_two_runs_give_the_same_bits() -> None:
    cos, sin = tables(1, 7, 4, torch.float32)
    qkv = make(2, 7, 64, dtype=torch.float32).requires_grad_()
    weights = [make(8, dtype=torch.float32, seed=seed).requires_grad_() for seed in (1, 2)]
    runs = []
    for _ in range(2):
        parts = rope_heads(qkv, cos, sin, 4, 2, q_norm_weight=weights[0], k_norm_weight=weights[1])
        runs.append([*parts, *torch.autograd.grad([x.square().sum() for x in parts], [qkv, *weights])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty_and_strided() -> None:
    cos, sin = tables(1, 5, 4, torch.float32)
    assert rope(torch.empty(0, 5, 2, 8), cos, sin).shape == (0, 5, 2, 8)
    w = torch.ones(8, requires_grad=True)
    qkv = torch.empty(0, 5, 32, requires_grad=True)
    q, _, _ = rope_heads(qkv, cos, sin, 2, 1, q_norm_weight=w, k_norm_weight=torch.ones(8))
    assert q.shape == (0, 2, 5, 8)
    q.sum().backward()
    assert torch.equal(w.grad, torch.zeros(8))  # type: ignore[arg-type]
    x = make(2, 5, 6, 16, dtype=torch.float32)[:, :, ::2, ::2]
    torch.testing.assert_close(rope(x, cos, sin), rope_reference(x, cos, sin))


def test_registration_compiling_and_checkpointing() -> None:
    cos, sin = tables(1, 5, 4, torch.float32)
    x, qkv = (
        make(2, 5, 3, 8, dtype=torch.float32).requires_grad_(),
        make(2, 5, 32, dtype=torch.float32).requires_grad_(),
    )
    w = torch.ones(8, requires_grad=True)
    torch.library.opcheck(rope_rotate, (x, cos, sin, False, False))
    torch.library.opcheck(rope_heads_forward, (qkv, cos, sin, None, None, 2, 1, False, 1e-6, False))
    torch.library.opcheck(rope_heads_forward, (qkv, cos, sin, w, w.detach() + 1, 2, 1, True, 1e-6, True))

    def function(qkv: Tensor) -> Tensor:
        return torch.cat(rope_heads(qkv, cos, sin, 2, 1, q_norm_weight=w, k_norm_weight=w), dim=1).square()

    expected = torch.autograd.grad(function(qkv).sum(), qkv)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(qkv).sum(), qkv)[0], expected)
    again = torch.utils.checkpoint.checkpoint(function, qkv, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), qkv)[0], expected)


def test_bad_input_is_refused() -> None:
    cos, sin = tables(1, 5, 4, torch.float32)
    qkv = torch.zeros(2, 5, 32)
    with pytest.raises(ValueError, match="qkv has shape"):
        rope_heads(qkv, cos, sin, 3, 2)
    with pytest.raises(ValueError, match="both or neither"):
        rope_heads(qkv, cos, sin, 2, 1, q_norm_weight=torch.ones(8))
    with pytest.raises(ValueError, match="k_norm_weight is"):
        rope_heads(qkv, cos, sin, 2, 1, q_norm_weight=torch.ones(8), k_norm_weight=torch.ones(7))
    with pytest.raises(ValueError, match="8 channels but a head has 6"):
        rope(torch.zeros(1, 5, 1, 6), cos, sin)
    with pytest.raises(ValueError, match=r"expected \[1 or 1, 4, R\]"):
        rope(torch.zeros(1, 4, 1, 8), cos, sin)
