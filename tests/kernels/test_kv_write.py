"""The cache write on the CPU: what lands where, and what is refused before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.kv_write.op import WRITE, _launch, kv_write, parts_of, quantize, write_kv
from trine.kernels.launch import recording
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.rms_norm import rms_norm
from trine.kernels.rope.op import rope, rope_tables
from trine.kernels.samples import meta
from trine.kernels.target import COMPILED


def make(**changes: Any) -> dict[str, Any]:
    """Three tokens with 4 query and 2 key/value heads of 8 channels; a pool of 2 blocks of 16."""
    generator = torch.Generator().manual_seed(0)
    cos, sin = rope_tables(torch.tensor([[0, 5, 9]]), torch.tensor([1.0, 0.5, 0.1, 0.01]), torch.float32)
    return {
        "qkv_NE": torch.randn(3, 64, generator=generator),
        "k_cache_PSKD": torch.zeros(2, 16, 2, 8),
        "v_cache_PSKD": torch.zeros(2, 16, 2, 8),
        "slots_N": torch.tensor([3, 31, -1]),
        "num_heads": 4,
        "cos_NR": cos[0],
        "sin_NR": sin[0],
    } | changes


def parts(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = arguments["qkv_NE"].view(3, 8, 8).split([4, 2, 2], dim=1)
    return q, k, v


@pytest.mark.parametrize("normed", [False, True])
def test_every_token_lands_in_its_slot(normed: bool) -> None:
    weights: dict[str, Any] = (
        {"q_norm_weight": torch.rand(8), "k_norm_weight": torch.rand(8), "eps": 1e-5} if normed else {}
    )
    arguments = make(**weights)
    found = write_kv(**arguments)
    q, k, v = parts(arguments)
    if normed:
        q, k = rms_norm(q, weights["q_norm_weight"], 1e-5), rms_norm(k, weights["k_norm_weight"], 1e-5)
    cos, sin = arguments["cos_NR"][None], arguments["sin_NR"][None]
    assert torch.equal(found, rope(q[None], cos, sin)[0])
    turned = rope(k[None], cos, sin)[0]
    assert torch.equal(arguments["k_cache_PSKD"][0, 3], turned[0])
    assert torch.equal(arguments["k_cache_PSKD"][1, 15], turned[1])
    assert torch.equal(arguments["v_cache_PSKD"][1, 15], v[1])
    for cache in (arguments["k_cache_PSKD"], arguments["v_cache_PSKD"]):
        assert int(cache.flatten(2).any(dim=-1).sum()) == 2


@pytest.mark.parametrize("normed", [False, True])
def test_parts_that_lie_apart_are_taken_as_a_joined_product(normed: bool) -> None:
    weights = {name: torch.rand(8) for name in ("q_norm_weight", "k_norm_weight") if normed}
    joined, apart = make(**weights), make(**weights)
    apart["qkv_NE"] = tuple(part.contiguous() for part in parts_of(apart["qkv_NE"], 4, 2, 8))
    assert torch.equal(write_kv(**joined), write_kv(**apart))
    for name in ("k_cache_PSKD", "v_cache_PSKD"):
        assert joined[name].any()
        assert torch.equal(joined[name], apart[name])


def test_slots_that_the_caller_has_checked_are_not_looked_at() -> None:
    arguments = make(slots_N=torch.tensor([4, 1, 4]))
    q = write_kv(**arguments, slots_checked=True)
    assert torch.equal(q, write_kv(**make()))
    assert arguments["v_cache_PSKD"][0, 1].any()


def test_without_tables_nothing_is_turned() -> None:
    arguments = make(cos_NR=None, sin_NR=None)
    assert torch.equal(write_kv(**arguments), parts(arguments)[0])
    assert torch.equal(arguments["k_cache_PSKD"][0, 3], parts(arguments)[1][0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_what_is_written_is_what_attention_reads(dtype: torch.dtype) -> None:
    pools = {name: torch.zeros(2, 16, 2, 8).to(dtype) for name in ("k_cache_PSKD", "v_cache_PSKD")}
    scales: dict[str, Any] = {name: torch.zeros(2, 16, 2) for name in ("k_scale_PSK", "v_scale_PSK")}
    arguments = make(**pools, **scales, slots_N=torch.tensor([16, 17, 18]))
    q = write_kv(**arguments)
    plain = make(slots_N=torch.tensor([16, 17, 18]))
    assert torch.equal(write_kv(**plain), q)
    table: dict[str, Any] = {
        "block_table_RM": torch.tensor([[1]], dtype=torch.int32),
        "lengths_R": torch.tensor([3], dtype=torch.int32),
        "query_starts": torch.tensor([0, 3], dtype=torch.int32),
        "max_queries": 3,
        "max_length": 3,
    }
    found = paged_attention(q, pools["k_cache_PSKD"], pools["v_cache_PSKD"], **table, **scales)
    expected = paged_attention(q, plain["k_cache_PSKD"], plain["v_cache_PSKD"], **table)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 if dtype == torch.int8 else 0.15)


def test_the_largest_number_of_a_head_takes_the_whole_range() -> None:
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3))
    y, scale = quantize(x, torch.int8)
    assert (y.abs().amax(dim=-1) == 127).all()
    assert ((y * scale[..., None] - x).abs() <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_NE": torch.ones(3, 63)}, r"qkv has shape \(3, 63\); expected \[N, 64\] for 4 heads, 2 key/value heads"),
        ({"qkv_NE": (torch.ones(3, 32), *torch.ones(2, 3, 15))}, r"k has shape \(3, 15\); expected \[N, 16\]"),
        ({"qkv_NE": (torch.ones(3, 32), *torch.ones(2, 3, 16).half())}, r"k is torch.float16 but q is torch.float32"),
        ({"qkv_NE": (torch.ones(3, 32), *torch.ones(2, 2, 16))}, r"k has shape \(2, 16\); expected \[N, 16\]"),
        ({"v_cache_PSKD": torch.ones(2, 16, 2, 9)}, r"the caches are .*; expected two \[P, S, K, D\] of one dtype"),
        ({"slots_N": torch.ones(3)}, r"slots are torch.float32 \(3,\); expected int64 \(3,\)"),
        ({"slots_N": torch.tensor([0, 1])}, r"slots are torch.int64 \(2,\)"),
        ({"slots_N": torch.tensor([0, 32, 1])}, "slot 32 is outside the pool of 32 slots"),
        ({"slots_N": torch.tensor([0, -2, 1])}, "slot -2 is outside the pool"),
        ({"slots_N": torch.tensor([4, 1, 4])}, "two tokens have one slot"),
        ({"sin_NR": None}, "cos and sin go together"),
        ({"q_norm_weight": torch.ones(8)}, "q_norm_weight and k_norm_weight go together"),
        ({"q_norm_weight": torch.ones(7), "k_norm_weight": torch.ones(8)}, r"q_norm_weight is torch.float32 \(7,\)"),
        ({"cos_NR": torch.ones(3, 5), "sin_NR": torch.ones(3, 5)}, "2R at most 8"),
        ({"cos_NR": torch.ones(3, 4).half(), "sin_NR": torch.ones(3, 4).half()}, "cos and sin are torch.float16"),
        ({"k_scale_PSK": torch.ones(2, 16, 2)}, "k_scale is given with caches of torch.float32"),
        ({"qkv_NE": torch.ones(3, 64).half(), "cos_NR": None, "sin_NR": None}, "the caches are torch.float32; make"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments = make(**changes)
    with pytest.raises(ValueError, match=message):
        write_kv(**arguments)
    assert not make()["k_cache_PSKD"].any()


def test_pools_whose_heads_are_not_dense_are_refused() -> None:
    cache = torch.zeros(2, 2, 16, 8).transpose(1, 2)
    with pytest.raises(ValueError, match="heads must be dense and slots lie at one stride"):
        write_kv(**make(k_cache_PSKD=cache, v_cache_PSKD=cache))


def test_a_quantized_pool_needs_its_scales() -> None:
    pools = {name: torch.zeros(2, 16, 2, 8).char() for name in ("k_cache_PSKD", "v_cache_PSKD")}
    with pytest.raises(ValueError, match=r"k_scale is missing for caches of torch.int8"):
        write_kv(**make(**pools))
    wrong = {"k_scale_PSK": torch.ones(2, 16, 2), "v_scale_PSK": torch.ones(2, 16)}
    with pytest.raises(
        ValueError, match=r"v_scale is torch.float32 \(2, 16\); expected contiguous float32 \(2, 16, 2\)"
    ):
        write_kv(**make(**pools, **wrong))


@pytest.mark.parametrize("target", COMPILED)
def test_few_tokens_get_many_programs(target: str) -> None:
    few, many = (
        WRITE.pick(torch.bfloat16, COMPILED[target], N=n, exact_D=128, exact_R=64).blocks["ROWS"] for n in (48, 10**6)
    )
    assert few < many


def test_one_compiled_kernel_serves_every_number_of_tokens() -> None:
    """A step of a server that no step before was like would have to wait for the compiler."""
    H, K, D, seen = 4, 2, 64, set()
    pool = meta(8, 16, K, D, dtype=torch.bfloat16)
    for N in (1, 2, 16, 33, 160):
        parts = parts_of(meta(N, (H + 2 * K) * D, dtype=torch.bfloat16), H, K, D)
        table = meta(N, 32, dtype=torch.bfloat16)
        with recording(COMPILED["sm_90"]) as launches:
            rest: Any = (meta(N, dtype=torch.int64), table, table, None, None, None, None, H, False, 1e-6, False)
            _launch(*parts, pool, pool, *rest)
        (only,) = launches
        counted = {p.name for p in only.kernel.params if not p.do_not_specialize}
        seen.add(tuple(sorted((n, x) for n, x in only.arguments.items() if n in counted and isinstance(x, int))))
    assert len(seen) == 1


def given(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the registered operation."""
    lists = [arguments[name] for name in ("k_cache_PSKD", "v_cache_PSKD", "slots_N")]
    rows = [part.clone(memory_format=torch.contiguous_format) for part in parts_of(arguments["qkv_NE"], 4, 2, 8)]
    none = torch.empty(len(rows[0]), 0)
    tables = [none if arguments[name] is None else arguments[name] for name in ("cos_NR", "sin_NR")]
    names = ("q_norm_weight", "k_norm_weight", "k_scale_PSK", "v_scale_PSK")
    options = arguments["num_heads"], False, 1e-6, False, False
    return *rows, *lists, *tables, *(arguments.get(name) for name in names), *options


# One token, neither turned nor normalised: what is returned must still be no part of what was given.
ALONE = {"qkv_NE": torch.ones(1, 64), "slots_N": torch.tensor([7]), "cos_NR": None, "sin_NR": None}
QUANTIZED = {name: torch.zeros(2, 16, 2, 8).char() for name in ("k_cache_PSKD", "v_cache_PSKD")}
VARIANTS: dict[str, dict[str, Any]] = {
    "turned": {},
    "normed": {name: torch.linspace(0.5, 1.5, 8) for name in ("q_norm_weight", "k_norm_weight")},
    "quantized": {**QUANTIZED, "k_scale_PSK": torch.zeros(2, 16, 2), "v_scale_PSK": torch.zeros(2, 16, 2)},
    "alone": ALONE,
    "empty": {**ALONE, "qkv_NE": torch.ones(0, 64), "slots_N": torch.zeros(0, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_compiles_whole_with_the_bits_of_the_plain_call(name: str) -> None:
    torch._dynamo.reset()
    plain: dict[str, Any]
    whole: dict[str, Any]
    plain, whole = (
        {key: x.detach().clone() if isinstance(x, Tensor) else x for key, x in make(**VARIANTS[name]).items()}
        for _ in range(2)
    )
    torch.library.opcheck(kv_write, given(make(**VARIANTS[name])))
    compiled = torch.compile(lambda named: write_kv(**named), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(whole), write_kv(**plain))
    for key, x in plain.items():
        if isinstance(x, Tensor):
            assert torch.equal(x, whole[key]), key
    assert name == "empty" or plain["k_cache_PSKD"].any()


@pytest.mark.parametrize(
    ("slots", "message"),
    [([0, 32, 1], "slot 32 is outside the pool of 32 slots"), ([4, 1, 4], "two tokens have one slot")],
)
def test_slots_are_checked_in_a_compiled_call_too(slots: list[int], message: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda named: write_kv(**named), fullgraph=True, backend="aot_eager")
    arguments = make(slots_N=torch.tensor([0, 2, 1]))
    assert torch.equal(compiled(arguments), write_kv(**arguments))
    arguments = make(slots_N=torch.tensor(slots))
    with pytest.raises(ValueError, match=message):
        compiled(arguments)
    assert not arguments["k_cache_PSKD"].any()
