"""Attention with one order over the keys on a GPU: a training step, prompts, chunks and decoding give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.attention.reference import attention_reference
from trine.kernels.invariant.attention import SPLIT, Sequences, invariant_attention, make_sequences
from trine.kernels.paged_attention import launcher
from trine.kernels.paged_attention.op import paged_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
DEVICE = torch.device("cuda")
# Largest error over the largest exact value.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def inputs(B: int, T: int, heads: tuple[int, int], D: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, laid out as [B, T, heads, D]."""
    H, K = heads
    return [draw(B, T, count, D, seed=n).to(dtype).transpose(1, 2) for n, count in enumerate((H, K, K))]


def served(
    tensors: list[Tensor], requests: list[tuple[int, int, int, int]], options: dict[str, Any], block_size: int = 16
) -> Tensor:
    """The last `count` of the first `length` tokens of the sequence that begins at `first` of `row`, from a pool.

    `requests`: (row, first, count, length). Blocks lie in reversed order, NaN where no key is.
    """
    q, k, v = tensors
    K, D = k.shape[1], k.shape[3]
    needed = [-(-length // block_size) for *_, length in requests]
    pools = [torch.full((sum(needed) + 1, block_size, K, D), float("nan"), device=DEVICE, dtype=q.dtype) for _ in "kv"]
    table = torch.zeros(len(requests), max(needed), dtype=torch.int32)
    taken, queries = sum(needed), []
    for entry, (row, first, count, length) in enumerate(requests):
        blocks = torch.arange(taken, taken - needed[entry], -1)
        taken -= needed[entry]
        table[entry, : needed[entry]] = blocks
        for pool, x in zip(pools, (k, v), strict=True):
            padded = torch.full((needed[entry] * block_size, K, D), float("nan"), device=DEVICE, dtype=q.dtype)
            padded[:length] = x[row, :, first : first + length].transpose(0, 1)
            pool[blocks.to(DEVICE)] = padded.view(-1, block_size, K, D)
        queries.append(q[row, :, first + length - count : first + length].transpose(0, 1))
    counts = [count for _, _, count, _ in requests]
    return paged_attention(
        torch.cat(queries),
        *pools,
        block_table_RM=table.to(DEVICE),
        lengths_R=torch.tensor([length for *_, length in requests], dtype=torch.int32, device=DEVICE),
        query_starts=torch.tensor([0, *counts], device=DEVICE).cumsum(0).to(torch.int32),
        max_queries=max(counts),
        max_length=max(length for *_, length in requests),
        split_size=SPLIT,
        **options,
    )


def check(
    tensors: list[Tensor], sequences: Sequences, requests: list[tuple[int, int, int, int]], **options: Any
) -> None:
    trained = invariant_attention(*tensors, sequences=sequences, **options)
    options["window"] = sequences.window
    wanted = [
        trained[row, :, first + length - count : first + length].transpose(0, 1)
        for row, first, count, length in requests
    ]
    together = served(tensors, requests, options)
    assert torch.equal(together, torch.cat(wanted))
    for request, expected in zip(requests, wanted, strict=True):
        assert torch.equal(served(tensors, [request], options), expected), request


REQUESTS = [
    (0, 0, 1, 1),
    (1, 0, 1, 700),
    (0, 0, 1, 1500),
    (1, 0, 200, 900),
    (0, 0, 1300, 1300),
    (1, 0, 17, 1024),
    (0, 0, 1, 513),
]


@DTYPES
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((8, 2), 128), ((4, 4), 64), ((6, 2), 80), ((2, 1), 256), ((12, 1), 32)], ids=str
)
def test_decoding_and_chunks_have_the_bits_of_training(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    check(inputs(2, 1500, heads, head_dim, dtype), make_sequences(2, 1500, device=DEVICE), REQUESTS)


@DTYPES
@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"sinks": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("window", [None, 0, 100, 600])
def test_with_every_option(window: int | None, options: dict[str, Any], dtype: torch.dtype) -> None:
    if options.pop("sinks", False):
        options["sinks_H"] = torch.linspace(-2, 4, 8, device=DEVICE).to(dtype)
    sequences = make_sequences(2, 1500, device=DEVICE, window=window)
    check(inputs(2, 1500, (8, 2), 64, dtype), sequences, REQUESTS, **options)


@DTYPES
def test_documents_of_a_packed_row_have_the_bits_they_have_alone(dtype: torch.dtype) -> None:
    ends = torch.tensor([3, 700, 701, 1333, 1500], device=DEVICE)
    ids = torch.bucketize(torch.arange(1500, device=DEVICE), ends, right=True).expand(2, -1)
    sequences = make_sequences(2, 1500, device=DEVICE, segment_ids_BT=ids)
    assert sequences.max_length == 697
    requests = [(0, 3, 1, 697), (1, 701, 632, 632), (1, 701, 1, 600), (0, 700, 1, 1), (1, 1333, 20, 167)]
    check(inputs(2, 1500, (8, 2), 64, dtype), sequences, requests)


@DTYPES
def test_many_rows_at_a_time_and_few_have_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits side by side and merged, or one after the other."""
    tensors = inputs(64, 1100, (8, 2), 64, dtype)
    many = invariant_attention(*tensors, sequences=make_sequences(64, 1100, device=DEVICE))
    few = invariant_attention(*(x[5:6] for x in tensors), sequences=make_sequences(1, 1100, device=DEVICE))
    assert torch.equal(few[0], many[5])
    monkeypatch.setattr(launcher, "_PART_BYTES", 0)
    again = invariant_attention(*(x[5:6] for x in tensors), sequences=make_sequences(1, 1100, device=DEVICE))
    assert torch.equal(again[0], many[5])


@DTYPES
@pytest.mark.parametrize("documents", [False, True])
def test_values_and_gradients(documents: bool, dtype: torch.dtype) -> None:
    tensors = [x.requires_grad_() for x in inputs(2, 777, (8, 2), 64, dtype)]
    ids = (torch.arange(777, device=DEVICE) > 300).long().expand(2, -1) if documents else None
    sequences = make_sequences(2, 777, device=DEVICE, segment_ids_BT=ids)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    o, expected = (
        invariant_attention(*tensors, sequences=sequences),
        attention_reference(*exact, causal=True, segment_ids_BT=ids),
    )
    do = draw(*o.shape, seed=9).to(dtype)
    mine, theirs = torch.autograd.grad(o, tensors, do), torch.autograd.grad(expected, exact, do.double())
    for found, wanted in zip((o, *mine), (expected, *theirs), strict=True):
        error = float((found.detach().double() - wanted.detach()).abs().max()) / float(wanted.detach().abs().max())
        assert found.dtype == dtype
        assert error <= BOUNDS[dtype], f"error {error:.2e}"
    again = torch.autograd.grad(invariant_attention(*tensors, sequences=sequences), tensors, do)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
