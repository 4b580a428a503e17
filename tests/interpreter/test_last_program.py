"""Parts merged by the program that comes last: in any order of programs the bits of two launches, and counters at 0.

The interpreter runs programs one after the other, so any of a tile's programs is made the last by the order alone. That
stores come before counting, on a GPU, is a matter of barriers: `tests/kernels/test_last_program.py` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from trine.kernels import last_program
from trine.kernels.last_program import LAST_PROGRAM
from trine.kernels.moe.groups import group_by_expert
from trine.kernels.paged_attention import launcher
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.quantized import scaled, weight_only
from trine.kernels.quantized.op import quantized_gated, quantized_linear
from trine.kernels.quantized.packing import pack
from trine.kernels.quantized.scaled_weight import scaled_weight
from trine.kernels.quantized_moe import product as grouped
from trine.kernels.quantized_moe.experts import pack_experts
from trine.kernels.quantized_moe.op import quantized_grouped_linear, quantized_moe_mlp
from trine.kernels.tuning import Config, force

ORDERS = ("as they are", "the last first", "mixed")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape: int, seed: int = 0) -> Tensor:
    """For codes of 4 bits, in one group; rows of some 300 numbers then give numbers around 1."""
    return (make(*shape, 1, seed=seed).abs() + 0.5) / 80


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.fixture(autouse=True)
def new_tensors_hold_nan() -> Iterator[None]:
    """Or parts that nobody has stored yet would be those of the call before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """The counters of all launches of a test: 0 before and after, and used."""
    kept, asked = torch.zeros(64, dtype=torch.int32), []

    def counters(like: Tensor, number: int) -> Tensor | None:
        assert number <= len(kept)
        if last_program.counters(like, 1) is None:
            return None
        asked.append(number)
        return kept

    for module in (weight_only, scaled, grouped, launcher):
        monkeypatch.setattr(module, "counters", counters)
    yield kept
    assert asked
    assert not kept.any()


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter counts through the grid; programs are told other places of it."""
    builder = interpreter.interpreter_builder
    set_dim, set_place = builder.set_grid_dim, builder.set_grid_idx
    places: dict[tuple[int, ...], tuple[int, ...]] = {}

    def set_grid_dim(*size: int) -> None:
        natural = list(product(*map(range, size)))
        changed = natural[::-1]
        if request.param == "mixed":
            mixed = torch.randperm(len(natural), generator=torch.Generator().manual_seed(1)).tolist()
            changed = [natural[place] for place in mixed]
        places.update(zip(natural, natural if request.param == ORDERS[0] else changed, strict=True))
        set_dim(*size)

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *place: set_place(*places[place]))
    return str(request.param)


def check(call: Callable[[], Tensor]) -> None:
    with LAST_PROGRAM.force(False):
        expected = call()
    with LAST_PROGRAM.force(True):
        # A second call starts with what the first has left in the counters.
        for _ in range(2):
            assert torch.equal(call(), expected)


@pytest.mark.usefixtures("counts", "order")
@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_packed_weights(bits: int) -> None:
    weight, other = (pack(codes(19, 1300 // bits, seed=s), scales(19, seed=s), bits=bits) for s in (0, 1))
    x, bias = make(5, 1300 // bits), make(19)
    with force({"weight_only_matmul": Config({"FEATURES": 16, "ROWS": 16, "SPLITS": 3})}):
        check(lambda: quantized_linear(x, weight, bias, activation="gelu_tanh"))
        check(lambda: quantized_gated(x, weight, other, activation="silu", gate_bias=bias, up_bias=bias))


@pytest.mark.usefixtures("counts", "order")
def test_products_of_codes() -> None:
    weight = scaled_weight(codes(19, 300), scales(19))
    x, bias = make(5, 300), make(19)
    check(lambda: quantized_linear(x, weight, bias, activation="silu"))


@pytest.mark.usefixtures("counts", "order")
def test_products_of_experts() -> None:
    gate, up = (pack_experts(codes(3, 19, 260, seed=s), scales(3, 19, seed=s), bits=4) for s in (0, 1))
    down = pack_experts(codes(3, 260, 19, seed=2), scales(3, 260, seed=2), bits=4)
    x, weights = make(4, 260), make(4, 2, seed=1).softmax(-1)
    ids = torch.tensor([[0, 2], [2, 0], [0, 3], [2, 0]])  # none goes to expert 1, one pair to none at all
    gate_bias, up_bias = make(3, 19), make(3, 19, seed=1)
    groups = group_by_expert(ids, 3)
    options: Any = {"activation": "silu", "gate_bias": gate_bias, "up_bias": up_bias}
    check(lambda: quantized_moe_mlp(x, ids, weights, gate, up, down, **options))
    check(lambda: quantized_grouped_linear(x, gate, groups, bias_EF=up_bias))


def attention(requests: tuple[tuple[int, int], ...], **options: Any) -> Callable[[], Tensor]:
    """Of (new tokens, keys) of each request."""
    starts = torch.tensor([0, *(count for count, _ in requests)]).cumsum(0).to(torch.int32)
    blocks = max(-(-length // 16) for _, length in requests)
    table = torch.arange(blocks * len(requests), dtype=torch.int32).view(len(requests), blocks).flip(0)
    q, k, v = make(int(starts[-1]), 4, 16), make(table.numel(), 16, 2, 16, seed=1), make(table.numel(), 16, 2, 16)
    return lambda: paged_attention(
        q, k, v, block_table_RM=table, lengths_R=torch.tensor([n for _, n in requests], dtype=torch.int32),
        query_starts=starts, max_queries=max(count for count, _ in requests), max_length=max(n for _, n in requests),
        **options,
    )  # fmt: skip


@pytest.mark.usefixtures("counts", "order")
@pytest.mark.parametrize("num_splits", [2, 5])
def test_attention_over_a_paged_cache(num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_num_splits", lambda *_: num_splits)
    monkeypatch.setattr(launcher, "_together", lambda *_: 3)
    check(attention(((1, 70), (1, 17)), sinks_H=make(4)))
    check(attention(((1, 70), (9, 25), (0, 0)), window=30))


@pytest.mark.usefixtures("counts", "order")
def test_attention_with_fixed_splits() -> None:
    check(attention(((3, 130),), split_size=64))


def test_where_it_is_not_verified_a_second_launch_merges() -> None:
    x = make(1)
    assert last_program.counters(x, 7) is None
    with LAST_PROGRAM.force(True):
        counters = last_program.counters(x, 7)
    assert counters is not None
    assert counters.tolist() == [0] * 7
