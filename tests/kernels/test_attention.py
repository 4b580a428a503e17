"""Attention against its definition in float64, in every supported combination."""

from __future__ import annotations

import pytest
import torch

from trine.kernels.attention import blocked
from trine.kernels.attention.op import attention, make_mask
from trine.kernels.attention.reference import attention_reference


def _inputs(
    B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B * 1000 + T)
    # [B, T, H, D] transposed: not contiguous, as the model calls it.
    q = torch.randn(B, T, H, D, generator=generator).transpose(1, 2)
    k = torch.randn(B, S, K, D, generator=generator).transpose(1, 2)
    v = torch.randn(B, S, K, D, generator=generator).transpose(1, 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("T", "D"), [(1, 8), (5, 16), (123, 20)])
def test_attention_equals_float64(causal: bool, H: int, K: int, T: int, D: int) -> None:
    q, k, v = _inputs(2, H, K, T, T, D)
    ours = attention(q, k, v, mask=make_mask(causal=causal, num_keys=T))
    exact = attention_reference(q.double(), k.double(), v.double(), causal=causal)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-6)
    scaled = attention(q, k, v, mask=make_mask(causal=causal, num_keys=T), scale=0.3)
    exact = attention_reference(q.double(), k.double(), v.double(), causal=causal, scale=0.3)
    torch.testing.assert_close(scaled.double(), exact, rtol=0, atol=3e-6)


def test_query_positions_hide_later_slots() -> None:
    q, k, v = _inputs(3, 4, 2, 2, 11, 8)
    positions = torch.tensor([[0, 1], [9, 10], [4, 5]])
    ours = attention(q, k, v, mask=make_mask(causal=True, num_keys=11, query_positions_BT=positions))
    exact = attention_reference(q.double(), k.double(), v.double(), causal=True, query_positions_BT=positions)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-6)


_SEGMENTS = {
    "one": [[0] * 200, [3] * 200],
    "long": [[0] * 70 + [1] * 130, [5] * 140 + [6] * 60],
    "short": [[t // 7 for t in range(200)], [t // 50 for t in range(200)]],
    "returning": [[0] * 80 + [1] * 60 + [0] * 60, [0] * 200],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", list(_SEGMENTS))
def test_segments_do_not_see_each_other(kind: str, causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(2, 4, 2, 200, 200, 8))
    segments = torch.tensor(_SEGMENTS[kind])
    ours = attention(q, k, v, mask=make_mask(causal=causal, num_keys=200, segment_ids_BT=segments))
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = attention_reference(q64, k64, v64, causal=causal, segment_ids_BT=segments)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-6)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(ours, (q, k, v), direction)
    exact_gradients = torch.autograd.grad(exact, (q64, k64, v64), direction.double())
    for one, two in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_within_its_rounding() -> None:
    q, k, v = _inputs(2, 4, 2, 64, 64, 32, torch.bfloat16)
    ours = attention(q, k, v, mask=make_mask(causal=True, num_keys=64))
    assert ours.dtype == torch.bfloat16
    exact = attention_reference(q.double(), k.double(), v.double(), causal=True)
    relative = float((ours.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert relative < 5e-3


def test_unsupported_combinations_are_refused() -> None:
    q, k, v = _inputs(1, 4, 2, 5, 5, 8)
    causal = make_mask(causal=True, num_keys=5)
    with pytest.raises(ValueError, match="dtypes"):
        attention(q, k.double(), v, mask=causal)
    with pytest.raises(ValueError, match="4 query heads do not divide into groups over 3"):
        attention(q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1), mask=causal)
    with pytest.raises(ValueError, match="as many queries as keys, not 3 and 5"):
        attention(q[:, :, :3], k, v, mask=causal)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="segment_ids_BT with query_positions_BT is not supported"):
        make_mask(causal=True, num_keys=5, query_positions_BT=ids, segment_ids_BT=ids)
    with pytest.raises(ValueError, match="length 5 for 6 keys"):
        make_mask(causal=True, num_keys=6, segment_ids_BT=ids)


@pytest.mark.parametrize("kind", [None, *_SEGMENTS])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2)])
def test_training_in_bfloat16_is_within_its_rounding(kind: str | None, H: int, K: int) -> None:
    """Values and gradients, against the error of the same formula computed naively in bf16."""
    T = 200
    segments = None if kind is None else torch.tensor(_SEGMENTS[kind])
    q, k, v = (x.requires_grad_() for x in _inputs(2, H, K, T, T, 16, torch.bfloat16))
    direction = torch.randn(2, H, T, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = attention(q, k, v, mask=make_mask(causal=True, num_keys=T, segment_ids_BT=segments))
    gradients = torch.autograd.grad(ours, (q, k, v), direction)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = attention_reference(wide[0], wide[1], wide[2], causal=True, segment_ids_BT=segments)
    exact_gradients = torch.autograd.grad(exact, wide, direction.double())
    assert ours.dtype == torch.bfloat16
    for one, two in zip((ours, *gradients), (exact, *exact_gradients), strict=True):
        assert float((one.double() - two).detach().norm() / two.detach().norm()) < 1e-2


def test_blocks_of_queries_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in _inputs(2, 4, 2, 160, 160, 16, torch.bfloat16))
    direction = torch.ones(2, 4, 160, 16, dtype=torch.bfloat16)
    results = []
    for numbers in (1, 2**22):  # blocks of 32 queries, and of 128
        monkeypatch.setattr(blocked, "_BLOCK_NUMBERS", numbers)
        o = attention(q, k, v, mask=make_mask(causal=True, num_keys=160))
        results.append((o, *torch.autograd.grad(o, (q, k, v), direction)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0.02 * float(two.detach().abs().max()))
