"""The Hopper attention kernel without a GPU: its schedule, its barriers and its numbers, from its own source."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from trine.kernels import aot, verified
from trine.kernels.attention import hopper, hopper_schedule
from trine.kernels.attention.bounds import Bounds, document_bounds, make_bounds
from trine.kernels.attention.forward import launch_forward
from trine.kernels.attention.hopper import options_of
from trine.kernels.attention.options import Options
from trine.kernels.attention.reference import attend
from trine.kernels.gluon_simulator import plain, simulate
from trine.kernels.launch import recording
from trine.kernels.target import Target
from trine.kernels.tuning import Config, force

# So few multiprocessors that every program has several tiles.
num_steps, next_tile, tile_place, key_blocks, whole_blocks = (
    plain(getattr(hopper_schedule, name))
    for name in ("num_steps", "next_tile", "tile_place", "key_blocks", "whole_blocks")
)
SMALL = Target("sm_90", num_sms=3, shared_bytes=227 * 1024)


# --- the schedule -----------------------------------------------------------------------------------------------------


def tiles_of(program: int, programs: int, rows: int, heads: int, at_once: int, section: int) -> list[tuple[int, int]]:
    found, state = [], (0, 0)
    for _ in range(num_steps(program, programs, section, rows * heads)):
        index, *state = next_tile(*state, program, programs, section)
        found.append(tile_place(index, rows, heads, at_once))
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("programs", "rows", "heads", "at_once"),
    [(1, 1, 1, 1), (3, 4, 5, 2), (132, 64, 48, 8), (132, 7, 100, 100), (7, 8, 3, 1), (5, 9, 23, 4), (6, 3, 10, 2)],
)
def test_every_tile_has_one_program(programs: int, rows: int, heads: int, at_once: int, causal: bool) -> None:
    section = rows * at_once if causal else rows * heads
    found = [tile for program in range(programs) for tile in tiles_of(program, programs, rows, heads, at_once, section)]
    assert sorted(found) == [(row, head) for row in range(rows) for head in range(heads)]


@pytest.mark.parametrize(
    ("T", "B", "H", "K", "D"),
    [
        (8192, 4, 48, 48, 128),
        (8192, 1, 16, 16, 64),
        (4096, 4, 32, 8, 128),
        (32768, 1, 32, 8, 128),
        (25600, 1, 16, 16, 256),
    ],
)
def test_a_causal_load_is_spread_evenly(T: int, B: int, H: int, K: int, D: int) -> None:
    rows, programs = T // 128, 132
    at_once = hopper.heads_at_once(rows, B * K, H // K, T, D, programs)
    loads = [
        sum(row + 1 for row, _ in tiles_of(program, programs, rows, B * H, at_once, at_once * rows))
        for program in range(programs)
    ]
    assert max(loads) <= 1.01 * sum(loads) / programs


def test_heads_at_one_time() -> None:
    # 4 MiB of keys and values a head: 8 of them; with groups of 4 query heads, 32.
    assert hopper.heads_at_once(64, 48, 1, 8192, 128, 132) == 8
    assert hopper.heads_at_once(64, 16, 4, 8192, 128, 132) == 32
    # Few tiles a head: more heads, for every multiprocessor needs some. Heads are divided evenly.
    assert hopper.heads_at_once(1, 1000, 1, 131072, 128, 132) == 334
    assert hopper.heads_at_once(64, 9, 1, 8192, 128, 132) == 5
    assert hopper.heads_at_once(4, 2, 4, 512, 64, 132) == 8


def test_later_queries_come_first_and_few_heads_at_a_time() -> None:
    places = [tile_place(index, 4, 6, 4) for index in range(24)]
    assert places[:5] == [(3, 0), (3, 1), (3, 2), (3, 3), (2, 0)]
    assert places[15:18] == [(0, 3), (3, 4), (3, 5)]


@pytest.mark.parametrize("block", [64, 128])
def test_blocks_hold_every_visible_key_and_whole_blocks_no_hidden_one(block: int) -> None:
    draw = random.Random(0)
    for _ in range(300):
        num_keys = draw.randint(1, 700)
        low, high = (sorted(draw.randint(0, num_keys) for _ in range(64)) for _ in range(2))
        high = [max(pair) for pair in zip(low, high, strict=True)]
        begin, end = key_blocks(low[0], high[-1], num_keys, block)
        whole_begin, whole_end = whole_blocks(low[-1], high[0], begin, end, block)
        assert 0 <= begin <= whole_begin <= whole_end <= end - 1
        assert begin * block < num_keys
        assert begin * block <= low[0] or low[0] == num_keys
        assert end * block >= high[-1]
        if high[-1] > low[0]:
            assert (end - 1) * block < high[-1]
            assert (begin + 1) * block > low[0]
        whole = [n for n in range(begin, end - 1) if n * block >= low[-1] and (n + 1) * block <= high[0]]
        assert list(range(whole_begin, whole_end)) == whole


# --- the kernel's source, simulated -----------------------------------------------------------------------------------


def inputs(B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def run(tensors: list[Tensor], options: Options, seed: int = 0, **how: Any) -> tuple[Tensor, Tensor]:
    with recording(SMALL) as launches:
        q, k, v = tensors
        o, lse = hopper.launch_hopper(q, k, v, options)
    o.fill_(float("nan"))
    lse.fill_(float("nan"))
    machine = simulate(launches[0], seed, **how)
    assert machine.registers == (240, 24)
    return o, lse


def check(tensors: list[Tensor], options: Options, visible: Tensor | None, seed: int = 0) -> None:
    o, lse = run(tensors, options, seed)
    sinks = None if options.sinks_H is None else options.sinks_H.double()
    exact, exact_lse = attend(*(x.double() for x in tensors), visible_BTS=visible, scale=options.scale, sinks_H=sinks)
    # Weights are rounded to half precision before they meet the values, and results at the end.
    bound = 2e-2 if o.dtype == torch.bfloat16 else 3e-3
    assert float((o.double() - exact).abs().max()) <= bound
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def plain_bounds(T: int, S: int, **mask: Any) -> Bounds:
    return make_bounds(torch.arange(T)[None], S, **mask)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("D", [64, 128, 256])
def test_causal(D: int, seed: int) -> None:
    T = 300
    bounds = plain_bounds(T, T, causal=True)
    check(inputs(2, 2, 1, T, T, D), options_of(None, causal=True, scale=D**-0.5), bounds.visible_BTS(), seed)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 700), (128, 128), (129, 257), (300, 64)])
def test_full(T: int, S: int) -> None:
    check(inputs(1, 3, 3, T, S, 64, torch.float16), options_of(None, causal=False, scale=0.3), None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [(0, 0), (100, 0), (200, 50), (500, 20), (None, 64)])
def test_windows(window: tuple[int | None, int | None], seed: int) -> None:
    bounds = plain_bounds(400, 400, causal=False, window=window)
    check(inputs(1, 2, 1, 400, 400, 64), options_of(bounds, causal=False, scale=0.125), bounds.visible_BTS(), seed)


@pytest.mark.parametrize("causal", [True, False])
def test_documents(causal: bool) -> None:
    ids = torch.tensor([[0] * 10 + [1] * 270 + [2] * 3 + [3] * 117, [7] * 400])
    start, end = document_bounds(ids)
    bounds = make_bounds(torch.arange(400).expand(2, -1), 400, causal=causal, start_BT=start, end_BT=end)
    check(inputs(2, 2, 2, 400, 400, 64), options_of(bounds, causal=causal, scale=0.125), bounds.visible_BTS())


def test_padding_and_rows_without_keys() -> None:
    lengths = torch.tensor([[0], [150], [300]]).expand(3, 300)
    positions = torch.arange(300).expand(3, -1)
    bounds = make_bounds(positions, 300, causal=True, end_BT=lengths)
    check(inputs(3, 2, 1, 300, 300, 64), options_of(bounds, causal=True, scale=0.125), bounds.visible_BTS())
    # Keys begin past the end of all keys: low = high = S, and S is a whole number of blocks.
    start = torch.full((1, 300), 256)
    bounds = make_bounds(positions[:1], 256, causal=False, start_BT=start)
    tensors = inputs(1, 2, 1, 300, 256, 64)
    o, lse = run(tensors, options_of(bounds, causal=False, scale=0.125))
    assert not o.any()
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


def test_sinks_cached_queries_and_every_layout() -> None:
    bounds = make_bounds(torch.arange(40)[None] + 460, 500, causal=True, window=(150, None))
    sinks = torch.tensor([-3.0, 0.0, 2.0, 5.0])
    q, k, v = inputs(2, 4, 2, 40, 500, 64)
    check([q, k, v], options_of(bounds, causal=True, scale=0.125, sinks_H=sinks), bounds.visible_BTS())
    # [B, H, T, D] as such, and a slice of a wider tensor.
    wide = torch.zeros(2, 500, 2, 128, dtype=torch.bfloat16)
    wide[..., 64:] = v.transpose(1, 2)
    tensors = [q.contiguous(), k.contiguous(), wide[..., 64:].transpose(1, 2)]
    check(tensors, options_of(bounds, causal=True, scale=0.125, sinks_H=sinks), bounds.visible_BTS())


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("turns", [0, 1])
def test_every_candidate_is_free_of_deadlocks(stages: int, turns: int) -> None:
    bounds = plain_bounds(300, 300, causal=False, window=(170, 90))
    for keys in (64, 128):
        config = Config({"BLOCK_N": keys, "STAGES": stages, "TAKE_TURNS": turns})
        with force({hopper.HOPPER.operation: config}):
            for seed in range(4):
                tensors, options = inputs(1, 2, 1, 300, 300, 64), options_of(bounds, causal=False, scale=0.125)
                check(tensors, options, bounds.visible_BTS(), seed)


def test_no_order_of_events_changes_a_bit() -> None:
    tensors, options = inputs(1, 3, 1, 300, 300, 64), options_of(None, causal=True, scale=0.125)
    first = run(tensors, options, seed=0)
    for seed in range(1, 5):
        for a, b in zip(run(tensors, options, seed=seed), first, strict=True):
            assert torch.equal(a, b)


def test_a_wrong_count_of_arrivals_is_noticed() -> None:
    """That empty slots are given back by one group alone, or wait for a third: what this simulation is for."""
    tensors, options = inputs(1, 2, 1, 300, 300, 64), options_of(None, causal=True, scale=0.125)
    with pytest.raises(AssertionError, match="deadlock"):
        run(tensors, options, arrivals=lambda count: 3 if count == 2 else count)
    with pytest.raises(AssertionError, match=r"shared memory changed|deadlock"):
        run(tensors, options, arrivals=lambda count: 1)


# --- the choice -------------------------------------------------------------------------------------------------------


def forced(use: bool | None, tensors: list[Tensor], options: Options, target: Target) -> str:
    """The kernel that a forward pass launches."""
    q, k, v = tensors
    how = nullcontext() if use is None else hopper.EXPERIMENTAL.force(use)
    with recording(target) as launches, how:
        launch_forward(q, k, v, options)
    name: str = launches[0].kernel.__name__
    return name


def test_kernel_is_chosen_where_it_is_verified_or_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors, options = inputs(1, 2, 1, 64, 64, 64), options_of(None, causal=True, scale=0.125)
    h200 = replace(SMALL, gpu="NVIDIA H200")
    assert forced(None, tensors, options, SMALL) == forced(False, tensors, options, SMALL) == "_forward_kernel"
    assert forced(True, tensors, options, SMALL) == "hopper_kernel"
    monkeypatch.setattr(verified, "VERIFIED", tmp_path / "verified.json")
    verified._entries.cache_clear()
    assert forced(None, tensors, options, h200) == "_forward_kernel"
    verified.mark_verified(hopper.OPERATION, h200.gpu)
    assert forced(None, tensors, options, h200) == "hopper_kernel"
    assert forced(False, tensors, options, h200) == "_forward_kernel"
    assert forced(None, tensors, options, replace(h200, gpu="NVIDIA H100 80GB HBM3")) == "_forward_kernel"
    assert forced(None, tensors, options, replace(h200, arch="sm_100")) == "_forward_kernel"
    assert forced(None, tensors, replace(options, softcap=30.0), h200) == "_forward_kernel"
    monkeypatch.setattr(triton, "__version__", "0.0")
    assert forced(None, tensors, options, h200) == "_forward_kernel"
    verified._entries.cache_clear()


def test_nothing_is_verified_before_it_ran() -> None:
    """Entries are written by the checks on a GPU; whoever adds one by hand should have to change this test."""
    entries = json.loads(verified.VERIFIED.read_text())
    assert set(entries) == {hopper.OPERATION}
    assert all(set(pair) == {"triton", "gpu"} for pair in entries[hopper.OPERATION])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"slopes_H": torch.ones(2)}, "alibi_slopes_H"),
        ({"bias_HR": torch.ones(2, 127)}, "relative_bias_HR"),
        ({"seed": torch.zeros(1, dtype=torch.int64), "drop": 0.1}, "dropout"),
        ({"scale": -1.0}, "not positive"),
        ({"ordered": False}, "ascend"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_for_the_twin(changed: dict[str, Any], reason: str) -> None:
    q, k, v = inputs(1, 2, 1, 64, 64, 64)
    options = options_of(None, causal=True, scale=0.125)
    assert hopper.usable(q, k, v, options, SMALL)
    options = replace(options, **changed)
    assert reason in (hopper.obstacle(q, k, v, options, SMALL) or "")
    with pytest.raises(ValueError, match="is forced but cannot be used"):
        forced(True, [q, k, v], options, SMALL)


def test_tensors_for_the_twin() -> None:
    options = options_of(None, causal=False, scale=0.125)

    def obstacle(q: Tensor, k: Tensor, v: Tensor, target: Target = SMALL) -> str:
        return hopper.obstacle(q, k, v, options, target) or ""

    q, k, v = inputs(2, 2, 1, 64, 64, 64)
    assert obstacle(q, k, v) == ""
    assert "sm_80" in obstacle(q, k, v, replace(SMALL, arch="sm_80"))
    assert "float32" in obstacle(q.float(), k.float(), v.float())
    odd = torch.zeros(2, 1, 64, 80, dtype=torch.bfloat16)
    assert "head size 80" in obstacle(odd, odd, odd)
    assert "k is empty" in obstacle(q, k[:, :, :0], v[:, :, :0])
    wide = torch.zeros(2, 64, 1, 68, dtype=torch.bfloat16)
    assert "address of k" in obstacle(q, wide[..., 4:].transpose(1, 2), v)
    assert "strides" in obstacle(q, k, wide[..., :64].transpose(1, 2))
    assert "strides" in obstacle(q, k[:1].expand(2, -1, -1, -1), v)
    # The stride of a dimension of one is never used.
    assert obstacle(q[:1], k[:1].as_strided((1, 1, 64, 64), (0, 3, 64, 1)), v[:1]) == ""
    assert "last dimension" in obstacle(q, k, torch.zeros(2, 1, 64, 64, dtype=torch.bfloat16).transpose(2, 3))


def test_compiling_ahead_notices_a_kernel_that_lost_its_roles() -> None:
    job = next(aot.jobs(aot.Selection(("attention.hopper",), "full 128", ("sm_90",))))
    row = {"shared": 164_232, "spills": 0, "matrix": 96, "setmaxnreg": 12, "warps": 12, "serialised": False}
    assert aot._problems(row, job) == []
    for lost in ({"setmaxnreg": 0}, {"warps": 4}):
        assert "not warp-specialized" in aot._problems(row | lost, job)[0]
    assert "wait for one another" in aot._problems(row | {"serialised": True}, job)[0]
