"""Paged attention on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.paged_attention.reference import paged_attention_reference

# Largest error over the root mean square of the exact values, beyond the rounding of the result itself (a query that
# sees few keys has results far larger than that). With a soft cap scores err by roundings of the cap.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
MIXED = ((1, 3000), (512, 2048), (300, 300), (1, 17), (77, 4000), (0, 0), (1, 1))


def make(
    requests: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    block_size: int = 16,
) -> dict[str, Any]:
    """Arguments by name; blocks scattered over the pool, NaN wherever no key lies."""
    generator = torch.Generator("cuda").manual_seed(0)
    H, K = heads
    needed = [-(-length // block_size) for _, length in requests]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(requests), max(needed), dtype=torch.int32)
    k, v = (torch.randn(len(order), block_size, K, head_dim, device="cuda", generator=generator) for _ in range(2))
    taken = 0
    for row, (_, length) in enumerate(requests):
        blocks = order[taken : taken + needed[row]]
        table[row, : needed[row]] = blocks
        taken += needed[row]
        if length % block_size:
            for cache in (k, v):
                cache[int(blocks[-1]), length % block_size :] = float("nan")
    starts = torch.tensor([0, *(count for count, _ in requests)]).cumsum(0).to(torch.int32)
    return {
        "q_NHD": torch.randn(int(starts[-1]), H, head_dim, device="cuda", generator=generator).to(dtype),
        "k_cache_PSKD": k.to(dtype),
        "v_cache_PSKD": v.to(dtype),
        "block_table_RM": table.cuda(),
        "lengths_R": torch.tensor([length for _, length in requests], dtype=torch.int32, device="cuda"),
        "query_starts": starts.cuda(),
        "max_queries": max(count for count, _ in requests),
        "max_length": max(length for _, length in requests),
    }


def check(arguments: dict[str, Any]) -> None:
    found = paged_attention(**arguments)
    left_out = ("max_queries", "max_length", "split_size")
    wide = {name: value for name, value in arguments.items() if name not in left_out}
    for name in ("q_NHD", "k_cache_PSKD", "v_cache_PSKD"):
        if arguments[name].dtype == arguments["q_NHD"].dtype:
            wide[name] = arguments[name].double()
    exact = paged_attention_reference(**wide)
    dtype = arguments["q_NHD"].dtype
    size = float(exact.square().mean().sqrt())
    rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * (arguments.get("softcap") or 0)
    error = float(((found.double() - exact).abs() - rounding).max()) / size
    assert error <= BOUNDS[dtype], f"largest error {error:.2e}"


@DTYPES
@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (12, 1)], ids=str)
def test_mixed_batches(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(make(MIXED, dtype, heads=heads))


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_head_and_block_sizes(head_dim: int, block_size: int) -> None:
    check(make(MIXED, torch.bfloat16, head_dim=head_dim, block_size=block_size))


@pytest.mark.parametrize("batch", [1, 4, 32, 256])
@pytest.mark.parametrize("split_size", [None, 512])
def test_decoding(batch: int, split_size: int | None) -> None:
    requests = tuple((1, 1000 + 37 * row % 3000) for row in range(batch))
    check(make(requests, torch.bfloat16) | {"split_size": split_size})


@DTYPES
def test_window_softcap_and_sinks(dtype: torch.dtype) -> None:
    arguments = make(MIXED, dtype, head_dim=64)
    sinks = torch.linspace(-2, 4, 32, device="cuda").to(dtype)
    check(arguments | {"window": 127, "sinks_H": sinks})
    check(arguments | {"window": 1000, "softcap": 30.0, "split_size": 256})


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
@DTYPES
def test_quantized_pools(cache: torch.dtype, dtype: torch.dtype) -> None:
    if cache == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    arguments = make(MIXED, dtype)
    for name, scales in (("k_cache_PSKD", "k_scale_PSK"), ("v_cache_PSKD", "v_scale_PSK")):
        x = arguments[name].float().nan_to_num(1.0)
        scale = x.abs().amax(dim=-1) / (127 if cache == torch.int8 else 448)
        y = x / scale[..., None]
        arguments |= {name: (y.round() if cache == torch.int8 else y).to(cache), scales: scale}
    check(arguments)
    check(arguments | {"split_size": 512})


def one(arguments: dict[str, Any], row: int, token: int) -> Tensor:
    """A token of a request by itself, as if it were decoded, with the keys it had."""
    start, end = arguments["query_starts"][row : row + 2].tolist()
    length = int(arguments["lengths_R"][row]) - (end - start) + token + 1
    return paged_attention(
        arguments["q_NHD"][start + token : start + token + 1],
        arguments["k_cache_PSKD"],
        arguments["v_cache_PSKD"],
        block_table_RM=arguments["block_table_RM"][row : row + 1],
        lengths_R=torch.tensor([length], dtype=torch.int32, device="cuda"),
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        max_queries=1,
        max_length=length,
        split_size=arguments["split_size"],
    )


@DTYPES
def test_fixed_splits_give_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    arguments = make(MIXED, dtype) | {"split_size": 256}
    together = paged_attention(**arguments)
    assert torch.equal(together, paged_attention(**arguments))
    starts = arguments["query_starts"].tolist()
    for row, (count, _) in enumerate(MIXED):
        for token in {0, 1, count // 2, count - 1} & set(range(count)):
            place = starts[row] + token
            assert torch.equal(one(arguments, row, token), together[place : place + 1]), (row, token)


def test_two_runs_give_the_same_bits() -> None:
    arguments = make(MIXED, torch.bfloat16)
    assert torch.equal(paged_attention(**arguments), paged_attention(**arguments))


def test_offsets_past_2_to_the_31() -> None:
    """The pool has more than 2^31 numbers, and the keys lie in its last blocks."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    arguments = make(((1, 500), (40, 60)), torch.bfloat16)
    small = arguments["k_cache_PSKD"].shape[0]
    blocks = 2**31 // (16 * 8 * 128) + small + 1
    for name in ("k_cache_PSKD", "v_cache_PSKD"):
        pool = torch.empty(blocks, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
        pool[-small:] = arguments[name]
        arguments[name] = pool
    arguments["block_table_RM"] = arguments["block_table_RM"] + (blocks - small)
    expected = make(((1, 500), (40, 60)), torch.bfloat16)
    assert torch.equal(paged_attention(**arguments), paged_attention(**expected))
