"""Every operation of the kernel room on a GPU, against its own reference in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trine.kernels.attention.op import attention, make_mask
from trine.kernels.attention.reference import attention_reference
from trine.kernels.mlp.activation import ACTIVATIONS, gated, gated_reference

CUDA = torch.device("cuda")
# (max error over the reference's largest value) by dtype: forward and gradient.
BOUNDS = {torch.float32: (5e-6, 2e-5), torch.bfloat16: (2e-2, 4e-2)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def make(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Value and gradients of `function` in `dtype` on the GPU against `reference` in float64 on the CPU."""
    rounded = [x.to(dtype) for x in inputs]
    exact = [x.double().requires_grad_() for x in rounded]
    mine = [x.to(CUDA).requires_grad_() for x in rounded]
    expected, found = reference(*exact), function(*mine)
    weight = make(*expected.shape, seed=9).to(dtype).double()
    torch.autograd.backward(expected, weight)
    torch.autograd.backward(found, weight.to(CUDA, found.dtype))
    forward, backward = BOUNDS[dtype]
    assert relative(found, expected) < forward
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert relative(a.grad, b.grad) < backward


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().cpu().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp(activation: str, dtype: torch.dtype) -> None:
    inputs = (make(11, 123, seed=0), make(11, 123, seed=1))
    check(lambda g, u: gated(g, u, activation), lambda g, u: gated_reference(g, u, activation), inputs, dtype)


@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_attention(packed: bool, dtype: torch.dtype) -> None:
    segment_ids_BT = torch.tensor([[0] * 40 + [1] * 83, [0] * 123]) if packed else None
    on_gpu = None if segment_ids_BT is None else segment_ids_BT.to(CUDA)
    mask = make_mask(causal=True, num_keys=123, segment_ids_BT=on_gpu)
    check(
        lambda q, k, v: attention(q, k, v, mask=mask),
        lambda q, k, v: attention_reference(q, k, v, causal=True, segment_ids_BT=segment_ids_BT),
        (make(2, 6, 123, 32, seed=0), make(2, 2, 123, 32, seed=1), make(2, 2, 123, 32, seed=2)),
        dtype,
    )
