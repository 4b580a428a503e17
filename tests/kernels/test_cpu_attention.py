"""Compiled attention over a paged cache and the compiled cache write: against float64 and the operations of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.cpu import compiled
from trine.kernels.cpu.attention import attend_single
from trine.kernels.cpu.kv_write import can_write, write_kv_single
from trine.kernels.kv_write.op import write_kv, write_kv_reference
from trine.kernels.paged_attention import op
from trine.kernels.paged_attention.reference import paged_attention_reference

pytestmark = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    lengths: list[int], H: int = 4, K: int = 2, D: int = 16, S: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Requests of one new token each; their blocks lie scattered in a pool that has others too."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // S) for length in lengths]
    pool = sum(counts) + 3
    order = torch.randperm(pool, generator=generator).to(torch.int32)
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
    k, v = torch.randn(2, pool, S, K, D, generator=generator)
    return {
        "q_NHD": torch.randn(len(lengths), H, D, generator=generator).to(dtype),
        "k_cache_PSKD": k.to(dtype),
        "v_cache_PSKD": v.to(dtype),
        "block_table_RM": table,
        "lengths_R": torch.tensor(lengths, dtype=torch.int32),
        "query_starts": torch.arange(len(lengths) + 1, dtype=torch.int32),
    }


def quantized(arguments: dict[str, Any]) -> dict[str, Any]:
    changed = dict(arguments)
    for name, scales in (("k_cache_PSKD", "k_scale_PSK"), ("v_cache_PSKD", "v_scale_PSK")):
        scale = arguments[name].float().abs().amax(dim=-1) / 127
        changed |= {name: (arguments[name].float() / scale[..., None]).round().to(torch.int8), scales: scale}
    return changed


def call(arguments: dict[str, Any], **more: Any) -> Tensor:
    bounds = {"max_queries": 1, "max_length": int(arguments["lengths_R"].max())}
    return op.paged_attention(**(bounds | arguments | more))


def exact(arguments: dict[str, Any]) -> Tensor:
    doubles = {"q_NHD", "k_cache_PSKD", "v_cache_PSKD", "sinks_H"}
    return paged_attention_reference(**{n: x.double() if n in doubles else x for n, x in arguments.items()})


def close(found: Tensor, expected: Tensor, eager: Tensor) -> None:
    error, allowed = (float((x.double() - expected).abs().max()) for x in (found, eager))
    assert found.dtype == eager.dtype
    assert error <= 2 * allowed + torch.finfo(eager.dtype).eps * float(expected.abs().max())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 0},
    {"window": 5},
    {"window": 600},
    {"softcap": 2.0},
    {"sinks_H": torch.linspace(-2, 3, 4)},
    {"scale": 0.3, "softcap": 5.0, "window": 700, "sinks_H": torch.full((4,), 9.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_option_over_short_and_split_requests(dtype: torch.dtype, options: dict[str, Any]) -> None:
    arguments = make([1, 37, 1300, 512, 513], dtype=dtype) | options
    close(call(arguments), exact(arguments), paged_attention_reference(**arguments))


@pytest.mark.parametrize(
    ("H", "K", "D", "S"), [(1, 1, 8, 16), (6, 6, 20, 32), (8, 1, 64, 16), (71, 1, 8, 16), (9, 3, 5, 256)]
)
def test_groups_head_sizes_and_blocks(H: int, K: int, D: int, S: int) -> None:
    arguments = make([40, 3], H, K, D, S)
    close(call(arguments), exact(arguments), paged_attention_reference(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_pools_are_read_with_their_scales(dtype: torch.dtype) -> None:
    arguments = quantized(make([37, 600], dtype=dtype))
    close(call(arguments), exact(arguments), paged_attention_reference(**arguments))


def test_pools_may_be_views_of_something_larger() -> None:
    arguments = make([37, 20])
    expected = exact(arguments)
    both = torch.zeros(2, *arguments["k_cache_PSKD"].shape[:2], 5, 16)
    for part, name in enumerate(("k_cache_PSKD", "v_cache_PSKD")):
        both[part, :, :, 1:3] = arguments[name]
        arguments[name] = both[part, :, :, 1:3]
    torch.testing.assert_close(call(arguments).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_no_other_request_and_no_thread(dtype: torch.dtype, threads: None) -> None:
    arguments = make([700, 37, 1300], dtype=dtype)
    whole = call(arguments)
    for row in range(3):
        alone = {name: arguments[name][row : row + 1] for name in ("q_NHD", "block_table_RM", "lengths_R")}
        for number in (1, 2):
            torch.set_num_threads(number)
            found = call(arguments | alone | {"query_starts": torch.tensor([0, 1], dtype=torch.int32)})
            assert torch.equal(found[0], whole[row])


@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bits_of_a_head_depend_on_no_other_head_of_its_group(pool: torch.dtype) -> None:
    """7 heads meet a key as 4, 2 and 1; 40 channels are two vectors and a rest, 100 six and a rest."""
    for D in (40, 100):
        arguments = make([45, 600], H=7, K=1, D=D, dtype=torch.float32 if pool == torch.int8 else pool)
        arguments = quantized(arguments) if pool == torch.int8 else arguments
        whole = call(arguments)
        close(whole, exact(arguments), paged_attention_reference(**arguments))
        for h in range(7):
            assert torch.equal(call(arguments | {"q_NHD": arguments["q_NHD"][:, h : h + 1]})[:, 0], whole[:, h])


def test_keys_behind_the_newest_are_not_seen() -> None:
    """A vector of scores goes past the last key; the rest of its block holds anything."""
    arguments = make([1, 17, 40])
    expected = call(arguments)
    for row, length in enumerate((1, 17, 40)):
        block = int(arguments["block_table_RM"][row, (length - 1) // 16])
        for name in ("k_cache_PSKD", "v_cache_PSKD"):
            arguments[name][block, (length - 1) % 16 + 1 :] = float("nan")
    assert torch.equal(call(arguments), expected)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The requests that each call of the compiled attention gets."""
    seen: list[list[int]] = []

    def attend(*tensors: Any, **named: Any) -> None:
        seen.append(named["requests"])
        attend_single(*tensors, **named)

    monkeypatch.setattr(op, "attend_single", attend)
    return seen


def test_single_tokens_are_picked_out_of_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    arguments = make([37, 20, 50, 9])
    arguments["q_NHD"] = torch.randn(1 + 5 + 0 + 1, 4, 16, generator=torch.Generator().manual_seed(1))
    arguments["query_starts"] = torch.tensor([0, 1, 6, 6, 7], dtype=torch.int32)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)):
        typed = {n: x.to(dtype) if x.is_floating_point() else x for n, x in arguments.items()}
        found = call(typed, max_queries=5)
        torch.testing.assert_close(found.double(), exact(typed), rtol=0, atol=bound)
    assert seen == [[0, 3], [0, 3]]


def test_what_the_loops_cannot_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    call(make([37], dtype=torch.float16))
    call(make([37], dtype=torch.float64))
    call(make([37]), split_size=64)
    monkeypatch.setattr("trine.kernels.cpu.attention.available", lambda: False)
    call(make([37]))
    assert seen == []


def test_scores_that_are_no_numbers_stay_with_their_request() -> None:
    arguments = make([37, 40])
    arguments["q_NHD"][0, 1, 3] = float("nan")
    bad = call(arguments).isnan().any(dim=-1)
    assert bad.tolist() == [[False, True, False, False], [False] * 4]


# --- the cache write --------------------------------------------------------------------------------------------------


def rows(dtype: torch.dtype, cache: torch.dtype, *, R: int = 4, normed: bool = False, **more: Any) -> dict[str, Any]:
    """Three tokens, one of which goes nowhere; 4 query and 2 key/value heads of 8."""
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        "qkv_NE": torch.randn(3, 64, generator=generator).to(dtype),
        "k_cache_PSKD": torch.zeros(2, 16, 2, 8).to(cache),
        "v_cache_PSKD": torch.zeros(2, 16, 2, 8).to(cache),
        "slots_N": torch.tensor([3, -1, 31]),
        "num_heads": 4,
    }
    if R:
        arguments |= {name: torch.randn(3, R, generator=generator).to(dtype) for name in ("cos_NR", "sin_NR")}
    if normed:
        arguments |= {name: torch.rand(8, generator=generator) for name in ("q_norm_weight", "k_norm_weight")}
    if cache == torch.int8:
        arguments |= {name: torch.zeros(2, 16, 2) for name in ("k_scale_PSK", "v_scale_PSK")}
    return arguments | more


def definition(arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """`write_kv_reference` in float64: q, and the pools (left unquantized)."""
    doubles = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}
    pools = {name: torch.zeros(2, 16, 2, 8).double() for name in ("k_cache_PSKD", "v_cache_PSKD")}
    empty = torch.empty(3, 0, dtype=torch.float64)
    rest: dict[str, Any] = {
        "q_norm_weight": None,
        "k_norm_weight": None,
        "interleaved": False,
        "eps": 1e-6,
        "unit_offset": False,
    }
    rest |= {"cos_NR": empty, "sin_NR": empty}
    scales = {"k_scale_PSK": None, "v_scale_PSK": None}
    q = write_kv_reference(**(rest | doubles | pools | scales))
    return q, pools


CASES: list[dict[str, Any]] = [
    {},
    {"R": 0},
    {"R": 3},
    {"interleaved": True},
    {"normed": True, "eps": 1e-3},
    {"normed": True, "unit_offset": True, "R": 2},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_land_in_the_cache_as_by_torch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours, theirs = rows(dtype, dtype, **options), rows(dtype, dtype, **options)
    before = ours["qkv_NE"].clone()
    q, pools = definition(ours)
    eager = write_kv(**theirs)
    assert can_write(ours["qkv_NE"], ours["k_cache_PSKD"])
    close(write_kv_single(**ours), q, eager)
    for name, expected in pools.items():
        close(ours[name], expected, theirs[name])
    assert torch.equal(ours["qkv_NE"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_quantized_with_a_scale_a_head(dtype: torch.dtype) -> None:
    arguments = rows(dtype, torch.int8, normed=True)
    _, pools = definition(arguments)
    write_kv_single(**arguments)
    for name, scales in (("k_cache_PSKD", "k_scale_PSK"), ("v_cache_PSKD", "v_scale_PSK")):
        scale = arguments[scales]
        assert (scale > 0).sum() == 4  # two tokens, two heads
        largest = pools[name].abs().amax(dim=-1)
        torch.testing.assert_close(scale.double() * 127, largest, rtol=1e-6, atol=0)
        error = (arguments[name].double() * scale.double()[..., None] - pools[name]).abs()
        assert (error <= 0.501 * scale[..., None]).all()


def test_slots_of_a_larger_pool_are_left_alone() -> None:
    both = torch.zeros(2, 16, 2, 2, 8)
    arguments = rows(torch.float32, torch.float32)
    plain = dict(arguments)
    arguments |= {"k_cache_PSKD": both[:, :, 0], "v_cache_PSKD": both[:, :, 1]}
    write_kv_single(**arguments)
    write_kv_single(**plain)
    for part, name in enumerate(("k_cache_PSKD", "v_cache_PSKD")):
        assert torch.equal(both[:, :, part], plain[name])
        assert plain[name].flatten(2).any(dim=-1).sum() == 2
