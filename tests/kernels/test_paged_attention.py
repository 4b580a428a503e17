"""Paged attention on the CPU: against its definition, and what is refused before anything is computed."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trine.kernels import aot
from trine.kernels.attention.reference import attend
from trine.kernels.launch import Launch, recording
from trine.kernels.paged_attention.launcher import FORWARD, _launch, _num_splits
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.paged_attention.reference import paged_attention_reference
from trine.kernels.samples import meta
from trine.kernels.target import COMPILED

# (new tokens, keys): decoding, a whole prompt, a later chunk, nothing.
REQUESTS = ((1, 37), (20, 20), (7, 50), (0, 0))


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, *(count for count, _ in REQUESTS)]).cumsum(0).to(torch.int32)
    k, v = torch.randn(2, 9, 16, 2, 8, generator=generator)
    table = torch.full((4, 5), -1, dtype=torch.int32)
    order = torch.randperm(9, generator=generator).to(torch.int32)
    table[0, :3], table[1, :2], table[2, :4] = order[:3], order[3:5], order[5:]
    arguments = {
        "q_NHD": torch.randn(int(starts[-1]), 4, 8, generator=generator).to(dtype),
        "k_cache_PSKD": k.to(dtype),
        "v_cache_PSKD": v.to(dtype),
        "block_table_RM": table,
        "lengths_R": torch.tensor([length for _, length in REQUESTS], dtype=torch.int32),
        "query_starts": starts,
        "max_queries": 20,
        "max_length": 50,
    }
    return arguments | changes


def call(arguments: dict[str, Any]) -> Tensor:
    return paged_attention(**arguments)


def expected(arguments: dict[str, Any]) -> Tensor:
    """Every request by itself over keys laid end to end, in float64, written without the operation's own gathering."""
    known = ("window", "softcap", "sinks_H", "scale")
    extras = {name: arguments[name] for name in known if name in arguments}
    window = extras.pop("window", None)
    parts = []
    for row, (count, length) in enumerate(REQUESTS):
        if not count:
            continue
        start = int(arguments["query_starts"][row])
        keys = range(length)
        places = [(int(arguments["block_table_RM"][row, key // 16]), key % 16) for key in keys]
        k, v = (
            torch.stack([arguments[name][block, slot] for block, slot in places]).double().transpose(0, 1)[None]
            for name in ("k_cache_PSKD", "v_cache_PSKD")
        )
        visible = torch.tensor(
            [
                [key <= p and (window is None or key >= p - window) for key in keys]
                for p in range(length - count, length)
            ]
        )
        q = arguments["q_NHD"][start : start + count].double().transpose(0, 1)[None]
        parts.append(attend(q, k, v, visible_BTS=visible[None], **extras)[0][0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 6},
        {"window": 0},
        {"softcap": 2.0},
        {"sinks_H": torch.ones(4)},
        {"scale": 0.3},
        {"split_size": 64},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_equals_attention_over_keys_end_to_end(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    arguments = make(dtype, **options)
    found = call(arguments)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected(arguments), rtol=0, atol=tolerance)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_pools_are_dequantized_by_slot_and_head(cache: torch.dtype) -> None:
    arguments = make()
    plain = dict(arguments)
    for name, scales in (("k_cache_PSKD", "k_scale_PSK"), ("v_cache_PSKD", "v_scale_PSK")):
        scale = arguments[name].abs().amax(dim=-1) / (127 if cache == torch.int8 else 448)
        y = arguments[name] / scale[..., None]
        arguments |= {name: (y.round() if cache == torch.int8 else y).to(cache), scales: scale}
        plain[name] = arguments[name].float() * scale[..., None]
    torch.testing.assert_close(call(arguments), call(plain), rtol=0, atol=1e-6)
    torch.testing.assert_close(call(arguments | {"softcap": 2.0}), call(plain | {"softcap": 2.0}), rtol=0, atol=1e-6)


def test_the_reference_agrees_in_float64() -> None:
    arguments = make(torch.float64)
    known = {name: value for name, value in arguments.items() if not name.startswith("max_")}
    torch.testing.assert_close(paged_attention_reference(**known), expected(arguments), rtol=0, atol=1e-12)


def changed(name: str, row: Any, value: int) -> dict[str, Any]:
    tensor = make()[name].clone()
    tensor[row] = value
    return {name: tensor}


SCALES = torch.ones(9, 16, 2)
launch_any: Any = _launch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_NHD": torch.ones(28, 4, 9)}, r"q and the caches have shapes .*; expected \[N, H, D\]"),
        ({"q_NHD": torch.ones(28, 3, 8)}, "3 query heads do not divide into groups over 2"),
        ({"q_NHD": torch.ones(28, 4, 8).half()}, r"q is torch.float16 but the caches are torch.float32"),
        ({"lengths_R": torch.ones(4, dtype=torch.int64)}, "lengths is torch.int64; it must be int32"),
        ({"lengths_R": torch.ones(3, dtype=torch.int32)}, r"do not fit; expected \[R, M\], \[R\] and \[R \+ 1\]"),
        ({"window": -1}, "window is -1"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be positive"),
        ({"sinks_H": torch.ones(3)}, r"sinks_H has shape \(3,\); expected \(4,\)"),
        ({"split_size": 100}, "split_size is 100; it must be a positive multiple of 64"),
        ({"max_queries": 60}, "max_queries 60 and max_length 50 do not fit"),
        ({"k_scale_PSK": SCALES}, "k_scale is given with caches of torch.float32"),
        ({"k_cache_PSKD": torch.ones(9, 16, 2, 8).char()}, "k_scale is missing for caches of torch.int8"),
        ({"max_queries": 19}, "request 1 has 20 tokens and 20 keys, more than max_queries 19"),
        (changed("lengths_R", 2, 6), "request 2 has 7 tokens and 6 keys"),
        (changed("lengths_R", 0, 81) | {"max_length": 100}, "its table of 5 blocks of 16 holds 80"),
        (changed("block_table_RM", (0, 1), 9), "the table of request 0 names block 9; the pool has 9"),
        (changed("block_table_RM", (2, 0), -1), "the table of request 2 names block -1"),
        (changed("query_starts", 4, 27), "query_starts runs from 0 to 27; it must ascend from 0 to 28"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    if "k_cache_PSKD" in changes:
        changes = changes | {"v_cache_PSKD": changes["k_cache_PSKD"]}
    with pytest.raises(ValueError, match=message):
        call(make(**changes))


def test_blocks_of_odd_sizes_are_refused() -> None:
    cache = torch.ones(9, 24, 2, 8)
    with pytest.raises(ValueError, match="blocks have 24 slots; supported are 16, 32, 64, 128 and 256"):
        call(make(k_cache_PSKD=cache, v_cache_PSKD=cache))


def test_splits_fill_the_device_once_and_fall_smoothly() -> None:
    target = COMPILED["sm_90"]
    for per_sm in (1, 2):
        places = per_sm * target.num_sms
        splits = [_num_splits(programs, 32768, per_sm, target) for programs in range(1, 2000)]
        assert splits[0] == 128  # none shorter than 256 keys
        assert all(a >= b for a, b in pairwise(splits))
        assert all(programs * number <= places for programs, number in enumerate(splits, 1) if number > 1)
        # One more would not fit, so that no more than every second place is left empty.
        assert all(programs * (number + 1) > places for programs, number in enumerate(splits, 1) if number < 128)
    assert _num_splits(1, 100, 2, target) == 1


def recorded(requests: int, tokens: int, length: int = 4096, cache: torch.dtype = torch.bfloat16) -> list[Launch]:
    q, pool = meta(requests * tokens, 32, 128, dtype=torch.bfloat16), meta(64, 16, 8, 128, dtype=cache)
    scales = None if cache == torch.bfloat16 else meta(64, 16, 8)
    table, lengths, starts = (
        meta(*size, dtype=torch.int32) for size in ((requests, 256), (requests,), (requests + 1,))
    )
    with recording(COMPILED["sm_90"]) as launches:
        _launch(q, pool, pool, table, lengths, starts, None, scales, scales, tokens, length, 1.0, None, 0.0, 0)
    return launches


@pytest.mark.parametrize(("requests", "splits"), [(1, 33), (4, 8), (16, 2), (17, 1), (64, 1)])
def test_single_tokens_need_no_look_up_and_fill_the_device_once(requests: int, splits: int) -> None:
    launches = recorded(requests, 1, length=65536)
    assert launches[0].grid == (requests, 8, splits)
    assert launches[0].arguments["SINGLE"]
    assert len(launches) == 1 + (splits > 1)
    assert not recorded(requests, 2)[0].arguments["SINGLE"]


def test_pools_of_bytes_take_one_program_a_multiprocessor() -> None:
    assert recorded(1, 1, length=65536, cache=torch.int8)[0].grid == (1, 8, 16)


@pytest.mark.parametrize("target", COMPILED)
def test_fixed_splits_use_one_configuration_whatever_the_queries(target: str) -> None:
    arguments = make(split_size=64)
    names = ("sinks_H", "k_scale_PSK", "v_scale_PSK", "max_queries", "max_length", "scale", "window", "softcap")
    fixed = {"sinks_H": None, "k_scale_PSK": None, "v_scale_PSK": None, "scale": 1.0, "window": None, "softcap": 0.0}
    configs = set()
    for max_queries in (1, 20, 700):
        bounds = {"max_queries": max_queries, "max_length": 700}
        inputs = [value for name, value in arguments.items() if name not in (*names, "split_size")]
        rest = [(fixed | bounds)[name] for name in names]
        with recording(COMPILED[target]) as launches:
            launch_any(*inputs, *rest, 64)
        configs.add(tuple(sorted(launches[0].config.as_json().items())))
    assert len(configs) == 1


@pytest.mark.parametrize("target", COMPILED)
def test_a_tile_holds_a_whole_group(target: str) -> None:
    for group in (1, 4, 8, 71, 128):
        config = FORWARD.pick(torch.bfloat16, COMPILED[target], Q=1, exact_G=group, D=128, exact_bytes=2)
        assert config.blocks["BLOCK_M"] >= group


def test_no_loop_fuses_what_another_cannot() -> None:
    """Or the bits of a row would depend on which of its keys lie in masked tiles, and so on the batch."""
    for job in aot.jobs(aot.Selection(("paged_attention.launcher",), "fixed splits", ("sm_90",))):
        config = job.launch.config
        compiled = triton.compile(
            ASTSource(job.launch.kernel, *aot.specialised(job.launch)),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages, **job.launch.options},
        )
        fused = set(re.findall(r"fma\.rn\.f32\s+(%\w+)", compiled.asm["ptx"]))
        exponents = set(re.findall(r"ex2\.approx\.ftz\.f32\s+%\w+, (%\w+)", compiled.asm["ptx"]))
        assert exponents
        assert not fused & exponents
