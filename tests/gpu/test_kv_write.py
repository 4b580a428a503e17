"""The cache write on a GPU at real sizes, against the separate operations in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.kv_write import op
from trine.kernels.kv_write.op import TOPS, kv_write, parts_of, write_kv, write_kv_reference
from trine.kernels.rope.op import rope_tables

H, K, D = 32, 8, 128
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)


def make(
    num_tokens: int, dtype: torch.dtype, *, cache: torch.dtype | None = None, blocks: int = 1024
) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    positions = torch.randint(4096, (1, num_tokens), generator=generator, device="cuda")
    frequencies = 10000.0 ** (-torch.arange(D // 2, device="cuda") / (D // 2))
    cos, sin = (table[0] for table in rope_tables(positions, frequencies, dtype))
    pools = torch.zeros(2, blocks, 16, K, D, dtype=cache or dtype, device="cuda")
    scales = torch.zeros(2, blocks, 16, K, device="cuda") if cache is not None else (None, None)
    weights = torch.rand(2, D, generator=generator, device="cuda") + 0.5
    return {
        "qkv_NE": torch.randn(num_tokens, (H + 2 * K) * D, generator=generator, device="cuda").to(dtype),
        "k_cache_PSKD": pools[0],
        "v_cache_PSKD": pools[1],
        "slots_N": torch.randperm(blocks * 16, generator=generator, device="cuda")[:num_tokens],
        "cos_NR": cos,
        "sin_NR": sin,
        "q_norm_weight": weights[0],
        "k_norm_weight": weights[1],
        "k_scale_PSK": scales[0],
        "v_scale_PSK": scales[1],
        "num_heads": H,
        "interleaved": False,
        "eps": 1e-6,
        "unit_offset": False,
    }


def run(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q and the two pools, dequantized, as float64."""
    q = function(**arguments)
    pools = []
    for cache, scales in (("k_cache_PSKD", "k_scale_PSK"), ("v_cache_PSKD", "v_scale_PSK")):
        x = arguments[cache].double()
        pools.append(x if arguments[scales] is None else x * arguments[scales].double()[..., None])
    return q.double(), pools[0], pools[1]


def exact(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, where the separate operations take float64."""
    names = ("qkv_NE", "k_cache_PSKD", "v_cache_PSKD", "cos_NR", "sin_NR")
    on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    wide = {name: torch.zeros_like(on_cpu[name], dtype=torch.float64) for name in names[1:3]}
    wide |= {name: on_cpu[name].double() for name in ("qkv_NE", "cos_NR", "sin_NR")}
    q, k, v = run(write_kv_reference, on_cpu | wide | {"k_scale_PSK": None, "v_scale_PSK": None})
    return q.cuda(), k.cuda(), v.cuda()


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 17, 4096])
def test_equals_the_separate_operations(num_tokens: int, dtype: torch.dtype) -> None:
    arguments = make(num_tokens, dtype)
    for found, expected in zip(run(write_kv, arguments), exact(arguments), strict=True):
        bound = ROUNDINGS[dtype] * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 17, 4096])
def test_parts_that_lie_apart_give_the_same_bits(num_tokens: int, dtype: torch.dtype) -> None:
    joined, apart = make(num_tokens, dtype), make(num_tokens, dtype)
    apart["qkv_NE"] = tuple(part.contiguous() for part in parts_of(apart["qkv_NE"], H, K, D))
    for found, expected in zip(run(write_kv, apart), run(write_kv, joined), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", TOPS, ids=str)
def test_quantized_pools(cache: torch.dtype) -> None:
    if cache == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    arguments = make(2000, torch.bfloat16, cache=cache)
    _, *found = run(write_kv, arguments)
    _, *expected = exact(arguments)
    for pool, right in zip(found, expected, strict=True):
        largest = right.abs().amax(dim=-1, keepdim=True)
        step = largest / TOPS[cache] if cache == torch.int8 else right.abs() / 8 + largest / 448 / 256
        assert ((pool - right).abs() <= 0.502 * step + 0.01 * largest).all()


def test_offsets_past_2_to_the_31_and_the_same_bits_twice() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    blocks = 2**31 // (16 * K * D) + 8
    arguments = make(100, torch.bfloat16, blocks=blocks)
    arguments["slots_N"] = blocks * 16 - 1 - torch.arange(100, device="cuda")
    q = write_kv(**arguments)
    small = make(100, torch.bfloat16)
    small["slots_N"] = 1024 * 16 - 1 - torch.arange(100, device="cuda")
    assert torch.equal(write_kv(**small), q)
    for name in ("k_cache_PSKD", "v_cache_PSKD"):
        assert torch.equal(arguments[name][-7:], small[name][-7:])
        assert not arguments[name][:-7].any()


@pytest.mark.parametrize("cache", [None, torch.int8], ids=str)
def test_registration_and_compiling_whole(cache: torch.dtype | None) -> None:
    torch._dynamo.reset()
    named = make(4096, torch.bfloat16, cache=cache)
    lists = list(parts_of(named["qkv_NE"], H, K, D))
    lists += [named[name] for name in ("k_cache_PSKD", "v_cache_PSKD", "slots_N", "cos_NR", "sin_NR")]
    lists += [named[name] for name in ("q_norm_weight", "k_norm_weight", "k_scale_PSK", "v_scale_PSK")]
    torch.library.opcheck(kv_write, (*lists, H, False, 1e-6, False, False))
    plain, whole = (make(4096, torch.bfloat16, cache=cache) for _ in range(2))
    compiled = torch.compile(lambda arguments: write_kv(**arguments), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(whole), write_kv(**plain))
    assert torch.equal(whole["k_cache_PSKD"], plain["k_cache_PSKD"])
    assert torch.equal(whole["v_cache_PSKD"], plain["v_cache_PSKD"])


def test_slots_are_checked_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "CHECKING", True)
    arguments = make(17, torch.bfloat16)
    arguments["slots_N"][3] = 1024 * 16
    with pytest.raises(ValueError, match="slot 16384 is outside the pool of 16384 slots"):
        write_kv(**arguments)
