"""Layers over a paged cache in the interpreter: heads normalised, turned and written at once, or by operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.model.config import ModelConfig, RopeConfig
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.transformer import Transformer

# How heads come into the cache: normalised by the kernel that writes them, before it, or not at all; clipped; turned in
# part, in neighbouring pairs or, in some layers or with biases of relative positions, not.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"qk_norm": "head", "qkv_bias": True},
    "normed, offset": {"qk_norm": "head", "norm": "rms_offset", "placement": "both"},
    "normed by LayerNorm": {"qk_norm": "head", "norm": "layer"},
    "normed each": {"qk_norm": "each_head", "norm": "layer"},
    "normed whole": {"qk_norm": "full"},
    "clipped": {"qkv_clip": 0.7},
    "in part": {"rope": RopeConfig(partial=0.5), "rope_interleaved": True, "attention_sinks": True, "window": 5},
    "stretched": {"rope": RopeConfig(kind="yarn", factor=4.0, original_max_positions=16, attention_factor=1.3)},
    "not in every layer": {"unrotated_layers": (1,)},
    "relative": {"positions": "relative", "rope": None, "relative_buckets": 8, "relative_max_distance": 20},
    "learned": {"positions": "learned", "rope": None},
}


def make_model(dtype: torch.dtype, **changes: Any) -> Transformer:
    config = ModelConfig(
        family="llama", vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=48,
        max_positions=64,
    )  # fmt: skip
    model = Transformer(replace(config, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.3, generator=generator)
            parameter.add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.to(dtype)


def make_step(cache: PagedCache, counts: list[int], starts: list[int]) -> PagedStep:
    """Sequence n has blocks 2 n and 2 n + 1; the last one is padding."""
    positions = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    slots = rows * 32 + positions
    slots[rows == len(counts) - 1] = cache.padding_slot
    table = torch.arange(2 * len(counts), dtype=torch.int32).view(-1, 2)
    table[-1] = cache.num_blocks
    lengths = torch.tensor(starts, dtype=torch.int32) + torch.tensor(counts, dtype=torch.int32)
    return PagedStep(
        cache=cache,
        positions_BT=positions[None],
        slots_N=slots,
        block_table_RM=table,
        lengths_R=lengths,
        query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
        max_queries=max(counts),
        num_slots=int(lengths.max()),
    )


@torch.no_grad()
def computed(model: Transformer, pool: torch.dtype) -> tuple[list[Tensor], PagedCache]:
    """Hidden states of pieces of two sequences, then of a token of each with two rows of padding; and the cache."""
    cache = PagedCache(model.config, num_blocks=6, block_size=16, dtype=pool)
    outputs = []
    for counts, starts in (([5, 18, 1], [0, 0, 0]), ([1, 1, 2], [5, 18, 0])):
        cache.step = make_step(cache, counts, starts)
        ids = torch.arange(sum(counts))[None] * 7 % 50
        outputs.append(model(ids, cache=cache, compute_dtype=model.dtype)[0, : sum(counts[:-1])])
    return outputs, cache


def both(
    model: Transformer, pool: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], PagedCache, list[Tensor], PagedCache]:
    """In one launch, then by operation."""
    taken, turn = [], PagedStep.turn_and_attend

    def watched(step: PagedStep, layer: int, *given: Any, **named: Any) -> Tensor:
        taken.append(layer)
        return turn(step, layer, *given, **named)

    monkeypatch.setattr(PagedStep, "turn_and_attend", watched)
    found, cache = computed(model, pool)
    assert taken == [0, 1] * 2
    monkeypatch.setattr(PagedStep, "turning", None)
    expected, by_operation = computed(model, pool)
    assert len(taken) == 4
    return found, cache, expected, by_operation


FIRST = ("plain", "normed", "in part", "relative")


def some(cases: Iterable[Any], first: Iterable[Any]) -> list[Any]:
    return [pytest.param(case, marks=[] if case in first else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize("name", some(HEADS, FIRST))
def test_heads_of_every_kind(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """To the last bit where heads are not normalised on the way: a sum of squares in another order rounds otherwise."""
    found, cache, expected, by_operation = both(make_model(torch.float32, **HEADS[name]), torch.float32, monkeypatch)
    same: Any = {"rtol": 1e-5, "atol": 1e-5} if name in ("normed", "normed, offset") else {"rtol": 0.0, "atol": 0.0}
    for one, other in zip(found, expected, strict=True):
        assert other.std() > 0.1
        torch.testing.assert_close(one, other, **same)
    for pool, other in ((cache.k_LPSKD, by_operation.k_LPSKD), (cache.v_LPSKD, by_operation.v_LPSKD)):
        assert pool[:, 0, 4].any()
        torch.testing.assert_close(pool[:, :6], other[:, :6], **same)  # the last block is padding's


@pytest.mark.parametrize("dtype", some([torch.bfloat16, torch.float32], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("pool", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_caches_of_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, pool: torch.dtype | None) -> None:
    """Values have the same bits; turned keys are quantized before they would be rounded to `dtype`."""
    model = make_model(dtype, qk_norm="head")
    found, cache, expected, by_operation = both(model, pool or dtype, monkeypatch)
    first = slice(0, 1), slice(0, 6)  # a later layer meets what the first one rounded
    assert torch.equal(cache.v_LPSKD[first].float(), by_operation.v_LPSKD[first].float())
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < (
            1e-5 if pool is None and dtype == torch.float32 else 0.03
        )
    if pool is not None:
        assert cache.k_scale_LPSK is not None
        assert by_operation.k_scale_LPSK is not None
        scales, others = cache.k_scale_LPSK[first], by_operation.k_scale_LPSK[first]
        torch.testing.assert_close(scales, others, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=0)
        steps = (cache.k_LPSKD[first].float() - by_operation.k_LPSKD[first].float()).abs()
        largest = by_operation.k_LPSKD[first].float().abs()
        assert bool((steps <= (1 if pool == torch.int8 else largest / 8 + 2**-6)).all())


def test_what_hooks_add_to_products_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are hooks: a product of joined weights would not see them."""
    model = make_model(torch.float32)
    plain, _ = computed(model, torch.float32)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module.register_forward_hook(lambda _, given, y: y + given[0].amax(dim=-1, keepdim=True))
    found, cache, expected, by_operation = both(model, torch.float32, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(cache.v_LPSKD[:, :6], by_operation.v_LPSKD[:, :6])
    assert float((found[0] - plain[0]).abs().max()) > 0.1


def test_slots_are_checked_once_for_all_layers() -> None:
    cache = PagedCache(make_model(torch.float32).config, num_blocks=6, block_size=16)
    step = make_step(cache, [5, 18, 1], [0, 0, 0])
    step.check()
    step.slots_N[3] = 7 * 16
    with pytest.raises(ValueError, match="slot 112 is outside the pool of 112 slots"):
        step.check()
    step.slots_N[3] = step.slots_N[2]
    with pytest.raises(ValueError, match="two tokens have one slot"):
        step.check()
