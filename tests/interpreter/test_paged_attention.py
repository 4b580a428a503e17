"""Paged attention in the interpreter: ragged batches, splits, quantized pools, and bits that depend on nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.launch import launch
from trine.kernels.paged_attention import launcher, op
from trine.kernels.paged_attention.launcher import paged_attention_forward
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.paged_attention.reference import paged_attention_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# (new tokens, keys) of each request: decoding, a first chunk, a later chunk, an empty request.
MIXED = ((1, 37), (20, 20), (7, 50), (0, 0), (1, 1))


@dataclass(frozen=True)
class Batch:
    """The arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    starts: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def call(self, function: Any = paged_attention, **options: Any) -> Tensor:
        if function is paged_attention:
            counts = (self.starts[1:] - self.starts[:-1]).tolist()
            options = {"max_queries": max(counts), "max_length": int(self.lengths.max()), **options}
        result: Tensor = function(
            self.q,
            self.k,
            self.v,
            block_table_RM=self.table,
            lengths_R=self.lengths,
            query_starts=self.starts,
            k_scale_PSK=self.k_scale,
            v_scale_PSK=self.v_scale,
            **options,
        )
        return result


def make(
    requests: tuple[tuple[int, int], ...] = MIXED,
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    seed: int = 0,
) -> Batch:
    """Requests whose blocks lie scattered over a pool that holds garbage elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    H, K = heads
    needed = [-(-length // block_size) for _, length in requests]
    order = torch.randperm(sum(needed) + 2, generator=generator).to(torch.int32)
    table = torch.full((len(requests), max(needed) + 1), 2**30, dtype=torch.int32)
    k, v = (torch.full((len(order), block_size, K, head_dim), float("nan")) for _ in range(2))
    taken = 0
    for row, (_, length) in enumerate(requests):
        blocks = order[taken : taken + needed[row]]
        table[row, : needed[row]] = blocks
        taken += needed[row]
        for cache in (k, v):
            rows = torch.full((needed[row] * block_size, K, head_dim), float("nan"))
            rows[:length] = torch.randn(length, K, head_dim, generator=generator)
            cache[blocks.long()] = rows.view(needed[row], block_size, K, head_dim)
    counts = torch.tensor([0, *(count for count, _ in requests)])
    q = torch.randn(int(counts.sum()), H, head_dim, generator=generator)
    lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
    return Batch(q.to(dtype), k.to(dtype), v.to(dtype), table, lengths, counts.cumsum(0).to(torch.int32))


def check(compare: Any, name: str, batch: Batch, *, split_size: int | None = None, **options: Any) -> None:
    exact = replace(batch, q=batch.q.double(), k=widened(batch.k), v=widened(batch.v))
    plain = batch.call(paged_attention_reference, **options)
    found = batch.call(split_size=split_size, **options)
    compare.values(name, found, plain, exact.call(paged_attention_reference, **options))


def widened(cache: Tensor) -> Tensor:
    return cache if cache.dtype in op.QUANTIZED else cache.double()


@DTYPES
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (5, 1)], ids=str)
def test_ragged_batches(compare: Any, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(compare, "paged_attention", make(dtype=dtype, heads=heads))


def test_lists_may_be_columns_of_tables(compare: Any) -> None:
    batch = make(((1, 19), (5, 9), (3, 40)))
    lengths, starts = (torch.stack((x, x + 1), dim=1)[:, 0] for x in (batch.lengths, batch.starts))
    sinks = torch.linspace(-2, 4, 8)[::2]
    assert not any(x.is_contiguous() for x in (lengths, starts, sinks))
    check(compare, "paged_attention", replace(batch, lengths=lengths, starts=starts), sinks_H=sinks)


@pytest.mark.parametrize("head_dim", [32, 40, 128])
def test_head_sizes(compare: Any, head_dim: int) -> None:
    check(compare, "paged_attention", make(((1, 19), (5, 9)), head_dim=head_dim))


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_sizes(compare: Any, block_size: int) -> None:
    check(compare, "paged_attention", make(((1, 90), (3, 33)), block_size=block_size))


@pytest.mark.parametrize("window", [0, 5, 16, 40, 100])
@pytest.mark.parametrize("split_size", [None, 64])
def test_window(compare: Any, window: int, split_size: int | None) -> None:
    batch = make(((1, 150), (20, 41), (1, 3)))
    check(compare, "paged_attention window", batch, window=window, split_size=split_size)


@DTYPES
def test_softcap_and_sinks_and_scale(compare: Any, dtype: torch.dtype) -> None:
    sinks = torch.linspace(-1, 3, 4).to(dtype)
    batch = make(dtype=dtype)
    check(compare, "paged_attention softcap", batch, softcap=1.5, scale=0.7)
    check(compare, "paged_attention sinks", batch, sinks_H=sinks)
    check(compare, "paged_attention sinks", batch, sinks_H=sinks, softcap=2.0, window=11, split_size=64)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 20])
def test_any_number_of_splits(compare: Any, num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_num_splits", lambda *_: num_splits)
    batch = make(((1, 150), (9, 41), (1, 3), (0, 0)))
    check(compare, "paged_attention splits", batch, sinks_H=torch.ones(4))
    check(compare, "paged_attention splits", batch, window=30)


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0, "sinks_H": torch.ones(4)}], ids=str)
def test_one_token_of_every_request(compare: Any, options: dict[str, Any]) -> None:
    """Nothing is looked up then: tile, request and token are one number."""
    check(compare, "paged_attention single", make(((1, 37), (1, 1), (1, 50), (1, 16))), **options)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Per slot and head; unused slots stay garbage."""
    top = 127.0 if dtype == torch.int8 else 448.0
    scale = x.nan_to_num(7.0).abs().amax(dim=-1) / top
    y = x.nan_to_num(9.0) / scale[..., None]
    return (y.round().clamp(-127, 127) if dtype == torch.int8 else y).to(dtype), scale


@DTYPES
@pytest.mark.parametrize("cache", op.QUANTIZED, ids=str)
def test_quantized_pools(compare: Any, cache: torch.dtype, dtype: torch.dtype) -> None:
    batch = make(dtype=dtype)
    (k, k_scale), (v, v_scale) = quantize(batch.k.float(), cache), quantize(batch.v.float(), cache)
    batch = replace(batch, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    check(compare, "paged_attention quantized", batch)
    check(compare, "paged_attention quantized", batch, softcap=2.0, split_size=64)


def test_strides(compare: Any) -> None:
    batch = make()
    wide = torch.zeros(len(batch.q), 9, 16)
    wide[:, 3:7] = batch.q
    both = torch.stack((batch.k, batch.v), dim=2)
    strided = replace(
        batch, q=wide[:, 3:7], k=both[:, :, 0], v=both[:, :, 1], table=torch.cat((batch.table, batch.table), 1)[:, :5]
    )
    check(compare, "paged_attention", strided)
    assert torch.equal(strided.call(), batch.call())


def test_fixed_splits_give_bits_that_depend_on_the_own_keys_only(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"split_size": 64, "sinks_H": torch.ones(4)}
    requests = ((1, 150), (20, 90), (1, 64), (3, 129))
    batch = make(requests)
    together = batch.call(**options)
    starts = batch.starts.tolist()
    for row, (count, length) in enumerate(requests):
        own = slice(starts[row], starts[row + 1])
        alone = replace(
            batch,
            q=batch.q[own],
            table=batch.table[row : row + 1],
            lengths=batch.lengths[row : row + 1],
            starts=torch.tensor([0, count], dtype=torch.int32),
        )
        assert torch.equal(alone.call(**options), together[own])
        # One token, as if decoded: other chunks, other bounds. numpy's matrix product gives a row other bits at another
        # place of the block (tensor cores do not, see tests/gpu), so only tokens at the head of a block are compared.
        for token in range(0, count, 8):
            one = replace(
                alone,
                q=batch.q[own][token : token + 1],
                lengths=torch.tensor([length - count + token + 1], dtype=torch.int32),
                starts=torch.tensor([0, 1], dtype=torch.int32),
            )
            assert torch.equal(one.call(**options, max_length=300), together[own][token : token + 1])
    # Splits side by side and merged, or one after the other: the same.
    monkeypatch.setattr(launcher, "_PART_BYTES", 0)
    assert torch.equal(batch.call(**options), together)


def test_both_ways_of_fixed_splits_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    original = launch

    def watched(kernel: Any, grid: tuple[int, ...], config: Any, arguments: Any, **named: Any) -> None:
        if "PARALLEL" in arguments:
            taken.append(arguments["PARALLEL"])
        original(kernel, grid, config, arguments, **named)

    monkeypatch.setattr(launcher, "launch", watched)
    make(((1, 150),)).call(split_size=64)
    make(((1, 150), (20, 90), (1, 64), (3, 129))).call(split_size=64)
    assert taken == [True, False]


def test_nothing_to_do() -> None:
    empty = make(((0, 0), (0, 0)))
    assert empty.call().shape == (0, 4, 16)


def test_registration_and_compiling() -> None:
    batch = make(((1, 20), (4, 9)))
    arguments = (
        batch.q, batch.k, batch.v, batch.table, batch.lengths, batch.starts, torch.ones(4), None, None, 4, 20, 0.25, 7,
        1.5, 0,
    )  # fmt: skip
    torch.library.opcheck(paged_attention_forward, arguments)

    def function(q: Tensor) -> Tensor:
        return paged_attention_forward(q, *arguments[1:]) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch.q), function(batch.q))


def test_double_precision_and_wide_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head size 16 in torch.float64 is not supported"):
        make(dtype=torch.float64).call()
    with pytest.raises(ValueError, match=r"head size 288 in torch.float32 is not supported by the kernel; at most 256"):
        make(((1, 2),), head_dim=288).call()
