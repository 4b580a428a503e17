"""The chunked loss equals the whole one in float64, whatever the chunk size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.linear_cross_entropy import cross_entropy_reference, linear_cross_entropy, token_log_probs


def _inputs(N: int, C: int, V: int, *, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, C, generator=generator)
    weight = torch.randn(V, C, generator=generator) / C**0.5 * 3
    bias = torch.randn(V, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return hidden, weight, bias, targets


def _gradients(function: Any, leaves: list[Tensor], *args: Any, factor: float = 0.37) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = function(*leaves, *args)
    return (loss.detach(), *torch.autograd.grad(loss * factor, leaves))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000, None])
@pytest.mark.parametrize(("N", "C", "V"), [(1, 8, 5), (123, 16, 33)])
def test_value_and_gradients_equal_float64(N: int, C: int, V: int, chunk_rows: int | None, biased: bool) -> None:
    hidden, weight, bias, targets = _inputs(N, C, V)
    leaves = [hidden, weight, bias] if biased else [hidden, weight]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows)

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cross_entropy_reference(hidden, weight, targets, bias_V=bias)

    for one, two in zip(_gradients(ours, leaves), _gradients(exact, [x.double() for x in leaves]), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=3e-6, atol=3e-6)


def test_bfloat16_hidden_with_float32_weight() -> None:
    hidden, weight, _, targets = _inputs(64, 32, 50)
    results = {}
    for chunk_rows in (16, 64):
        results[chunk_rows] = _gradients(
            lambda h, w, rows=chunk_rows: linear_cross_entropy(h, w, targets, chunk_rows=rows),
            [hidden.bfloat16(), weight],
        )
    loss, dhidden, dweight = results[16]
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = _gradients(
        lambda h, w: cross_entropy_reference(h, w, targets), [hidden.bfloat16().double(), weight.double()]
    )
    for one, two in zip((loss, dhidden, dweight), exact, strict=True):
        relative = float((one.double() - two).norm() / two.norm())
        assert relative < 1e-2
    # Chunking changes only where partial sums of dweight are rounded to bf16.
    assert torch.equal(results[16][1], results[64][1])
    torch.testing.assert_close(results[16][0], results[64][0], rtol=1e-6, atol=0)


def test_whole_vocabulary_of_logits_is_never_held() -> None:
    hidden, weight, _, targets = _inputs(256, 8, 4096)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                seen.append(out.numel())
            return out

    with Watch():
        _gradients(lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=16), [hidden, weight])
    assert max(seen) <= 16 * 4096


def test_only_wanted_gradients_are_computed() -> None:
    hidden, weight, _, targets = _inputs(10, 8, 12)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, cross_entropy_reference(hidden, weight, targets))


def test_all_targets_ignored_is_zero() -> None:
    hidden, weight, _, targets = _inputs(5, 8, 12, ignored=1.1)
    loss, dhidden, dweight = _gradients(lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight])
    assert float(loss) == 0
    assert not dhidden.any()
    assert not dweight.any()


@pytest.mark.parametrize("chunk_rows", [1, 10, None])
def test_token_log_probs_sum_to_the_loss(chunk_rows: int | None) -> None:
    hidden, weight, bias, targets = _inputs(33, 16, 21)
    log_probs = token_log_probs(hidden, weight, targets, bias=bias, chunk_rows=chunk_rows)
    assert log_probs.shape == (33,)
    assert log_probs.dtype == torch.float32
    assert bool((log_probs[targets == -100] == 0).all())
    exact = torch.log_softmax(hidden.double() @ weight.double().T + bias.double(), dim=-1)
    valid = targets != -100
    torch.testing.assert_close(
        log_probs[valid].double(), exact[valid].gather(1, targets[valid, None])[:, 0], rtol=3e-6, atol=3e-6
    )
    assert token_log_probs(hidden[:0], weight, targets[:0]).shape == (0,)


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, _, targets = _inputs(5, 8, 12)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight[:, :7], targets)
    with pytest.raises(ValueError, match="do not fit"):
        token_log_probs(hidden[None], weight, targets)
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_rows=0)
