"""Attention with one order over the keys in the interpreter: values, gradients, and the bits of the paged kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.attention.reference import attend, attention_reference
from trine.kernels.invariant import attention as module
from trine.kernels.invariant.attention import invariant_attention, make_sequences
from trine.kernels.paged_attention.op import paged_attention

CPU = torch.device("cpu")


def inputs(B: int, T: int, dtype: torch.dtype, heads: tuple[int, int] = (4, 2), D: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, n, D, generator=generator).to(dtype).transpose(1, 2) for n in (heads[0], *heads[1:] * 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_values_and_gradients(compare: Any, documents: bool, dtype: torch.dtype) -> None:
    tensors = [x.requires_grad_() for x in inputs(2, 21, dtype)]
    ids = (torch.arange(21) > 12).long().expand(2, -1) if documents else None
    sequences = make_sequences(2, 21, device=CPU, segment_ids_BT=ids)
    plain, exact = ([x.detach().to(d).requires_grad_() for x in tensors] for d in (dtype, torch.float64))
    found = invariant_attention(*tensors, sequences=sequences)
    eager, expected = (attention_reference(*x, causal=True, segment_ids_BT=ids) for x in (plain, exact))
    compare.values("invariant_attention", found, eager, expected)
    do = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = (
        torch.autograd.grad(o, leaves, do.to(o.dtype))
        for o, leaves in ((found, tensors), (eager, plain), (expected, exact))
    )
    for three in zip(*gradients, strict=True):
        compare.values("invariant_attention backward", *three)


def test_window_softcap_and_sinks(compare: Any) -> None:
    tensors, sinks = inputs(1, 40, torch.float32), torch.linspace(-1, 2, 4)
    sequences = make_sequences(1, 40, device=CPU, window=9)
    found = invariant_attention(*tensors, sequences=sequences, softcap=2.0, sinks_H=sinks, scale=0.4)
    keys = torch.arange(40)
    visible = (keys <= keys[:, None]) & (keys >= keys[:, None] - 9)
    options: dict[str, Any] = {"visible_BTS": visible[None], "softcap": 2.0, "scale": 0.4}
    eager = attend(*tensors, sinks_H=sinks, **options)[0]
    exact = attend(*(x.double() for x in tensors), sinks_H=sinks.double(), **options)[0]
    compare.values("invariant_attention options", found, eager, exact)


def test_the_bits_are_those_of_a_paged_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that begins at the head of a block: at another place numpy's product may give other bits."""
    monkeypatch.setattr(module, "SPLIT", 64)
    q, k, v = inputs(1, 160, torch.float32)
    trained = invariant_attention(q, k, v, sequences=make_sequences(1, 160, device=CPU))
    pools = [x[0].transpose(0, 1).reshape(10, 16, 2, 16).flip(0) for x in (k, v)]
    for length, count in ((160, 160), (160, 32), (144, 16), (73, 1)):
        served = paged_attention(
            q[0, :, length - count : length].transpose(0, 1),
            *pools,
            block_table_RM=torch.arange(9, -1, -1, dtype=torch.int32)[None],
            lengths_R=torch.tensor([length], dtype=torch.int32),
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            max_queries=count,
            max_length=length,
            split_size=64,
        )
        assert torch.equal(served, trained[0, :, length - count : length].transpose(0, 1))
