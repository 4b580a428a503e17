"""The logits equal those of transformers: fp32, at most 2e-5 * max(1, logit scale) apart, in every way of running.

All texts are longer than the windows (8 or 9) and most longer than the original context of scaled rotations (64).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from trine.engine.errors import ContextLengthError
from trine.engine.model import moe
from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.kernels.moe.routing import route

Record = Callable[[str, str, float, float], None]


def _compare(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Largest difference and the tolerance for logits of this scale."""
    return float((ours - theirs).abs().max()), 2e-5 * max(1.0, float(theirs.abs().max()))


def _assert_equal(record: Record, name: str, mode: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference, tolerance = _compare(ours, theirs)
    record(name, mode, difference, tolerance)
    assert difference <= tolerance


def _run(model: Transformer, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids, **options))


def test_prefill_equals_transformers(pair: Any, sample_ids: torch.Tensor, record_parity: Record) -> None:
    model = load_model(pair.folder)
    _assert_equal(record_parity, pair.name, "prefill", _run(model, sample_ids), pair.oracle_logits(sample_ids))


def test_training_forward_equals_transformers(pair: Any, sample_ids: torch.Tensor, record_parity: Record) -> None:
    model = load_model(pair.folder)  # recording gradients joins q, k, v and gate, up; dropout is off
    ours = model.logits(model(sample_ids)).detach()
    _assert_equal(record_parity, pair.name, "training", ours, pair.oracle_logits(sample_ids))


def test_gradients_equal_transformers(main_pair: Any, sample_ids: torch.Tensor) -> None:
    model = load_model(main_pair.folder)
    ids = sample_ids[:, :24]
    targets = ids.roll(-1, dims=1)
    torch.nn.functional.cross_entropy(model.logits(model(ids)).flatten(0, 1), targets.flatten()).backward()
    main_pair.oracle.zero_grad()
    torch.nn.functional.cross_entropy(main_pair.oracle(ids).logits.flatten(0, 1), targets.flatten()).backward()
    ours, theirs = model.embed_tokens.weight.grad, main_pair.oracle.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    total_oracle = torch.stack([p.grad.norm() for p in main_pair.oracle.parameters()]).norm()
    torch.testing.assert_close(total, total_oracle, rtol=1e-5, atol=0.0)


def _spans(switch: int | None) -> list[tuple[int, int]]:
    """Tokens of a prompt and of the whole text; where the rotation changes with the length, one on either side."""
    return [(80, 100)] if switch is None else [(54, switch), (90, 100)]


def test_cached_decoding_equals_transformers(pair: Any, sample_ids: torch.Tensor, record_parity: Record) -> None:
    model = load_model(pair.folder)
    for prompt, length in _spans(model.config.rope_switch):
        ids = sample_ids[:, :length]
        cache = KVCache(model.config, 2, length)
        parts = [_run(model, ids[:, :prompt], cache=cache)]
        parts += [_run(model, ids[:, t : t + 1], cache=cache) for t in range(prompt, length)]
        _assert_equal(record_parity, pair.name, "decode", torch.cat(parts, dim=1), pair.oracle_logits(ids))
        assert cache.lengths_B.tolist() == [length, length]


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7, 33])
def test_chunked_prefill_equals_transformers(
    main_pair: Any, sample_ids: torch.Tensor, record_parity: Record, chunk: int
) -> None:
    model = load_model(main_pair.folder)
    ids = sample_ids[:, :80]
    cache = KVCache(model.config, 2, 80)
    lengths = torch.tensor([80, 80])
    parts = [_run(model, ids[:, t : t + chunk], cache=cache, lengths_B=lengths) for t in range(0, 80, chunk)]
    _assert_equal(
        record_parity, main_pair.name, f"chunks {chunk}", torch.cat(parts, dim=1), main_pair.oracle_logits(ids)
    )


def test_length_decides_which_factors_longrope_takes(
    make_pair: Callable[[str], Any], sample_ids: torch.Tensor, record_parity: Record
) -> None:
    pair = make_pair("phi3_longrope")
    model = load_model(pair.folder)
    switch = model.config.rope_switch
    assert switch == 64
    for length in (switch - 1, switch, switch + 1):
        ids = sample_ids[:, :length]
        _assert_equal(record_parity, pair.name, f"length {length}", _run(model, ids), pair.oracle_logits(ids))
    cache = KVCache(model.config, 2, 80)
    _run(model, sample_ids[:, :switch], cache=cache)
    with pytest.raises(ValueError, match=r"grown beyond 64 tokens.*compute it again from its beginning"):
        _run(model, sample_ids[:, switch : switch + 1], cache=cache)


def test_dynamic_rotations_grow_with_the_length_of_each_sequence(
    make_pair: Callable[[str], Any], sample_ids: torch.Tensor, record_parity: Record
) -> None:
    """Beyond the context too, in one document or several; over a cache only within it."""
    pair = make_pair("llama_dynamic_stretched")
    model = load_model(pair.folder)
    assert (model.config.max_positions, model.config.longest_sequence) == (64, 256)
    for length in (64, 65, 100, 160):
        ids = sample_ids[:, :length]
        _assert_equal(record_parity, pair.name, f"length {length}", _run(model, ids), pair.oracle_logits(ids))
    pair.oracle_logits(sample_ids[:, :8])  # transformers keeps the largest length until a short one comes
    spans = [(0, 20), (20, 90), (90, 160)]
    segments = torch.cat([torch.full((stop - start,), n) for n, (start, stop) in enumerate(spans)]).expand(2, -1)
    positions = torch.cat([torch.arange(stop - start) for start, stop in spans]).expand(2, -1)
    ours = _run(model, sample_ids, segment_ids_BT=segments, positions_BT=positions)
    theirs = torch.cat([pair.oracle_logits(sample_ids[:, start:stop]) for start, stop in spans], dim=1)
    _assert_equal(record_parity, pair.name, "packed", ours, theirs)
    cache = KVCache(model.config, 2, 80)
    ids = sample_ids[:, :40]
    _assert_equal(record_parity, pair.name, "cached", _run(model, ids, cache=cache), pair.oracle_logits(ids))
    with pytest.raises(ContextLengthError, match=r"65 tokens exceeds .* of 64 \(up to 256 without a cache, whose keys"):
        _run(model, sample_ids[:, 40:65], cache=cache)
    with pytest.raises(ContextLengthError, match=r"257 tokens exceeds"):
        _run(model, sample_ids.repeat(1, 2)[:, :257])


def test_left_padded_rows_equal_single_prompts(main_pair: Any, sample_ids: torch.Tensor, record_parity: Record) -> None:
    model = load_model(main_pair.folder)
    lengths = torch.tensor([23, 40])
    places = torch.arange(40) - (40 - lengths[:, None])
    ids = torch.where(places >= 0, sample_ids[:, :40], 0)
    # Padding is a document of its own.
    ours = _run(model, ids, segment_ids_BT=(places >= 0).long(), positions_BT=places.clamp(min=0))
    joined = torch.cat([ours[row, 40 - length :] for row, length in enumerate(lengths)])
    theirs = [main_pair.oracle_logits(ids[row : row + 1, 40 - length :])[0] for row, length in enumerate(lengths)]
    _assert_equal(record_parity, main_pair.name, "left padded", joined, torch.cat(theirs))


def test_ragged_batch_equals_single_prompts(pair: Any, sample_ids: torch.Tensor, record_parity: Record) -> None:
    model = load_model(pair.folder)
    lengths, new = [23, 5, 40], 6
    rows = torch.cat([sample_ids, sample_ids.flip(1)[:1]])[:, : max(lengths) + new]
    padded = torch.zeros(3, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, :length] = rows[row, :length]
    cache = KVCache(model.config, 3, max(lengths) + new)
    prefill = _run(model, padded, cache=cache)
    cache.lengths_B = torch.tensor(lengths)
    ours = [[prefill[row, :length]] for row, length in enumerate(lengths)]
    for t in range(new):
        step = torch.stack([rows[row, length + t] for row, length in enumerate(lengths)])[:, None]
        logits = _run(model, step, cache=cache)
        for row in range(3):
            ours[row].append(logits[row])
    theirs = [pair.oracle_logits(rows[row : row + 1, : length + new])[0] for row, length in enumerate(lengths)]
    joined = torch.cat([torch.cat(parts) for parts in ours])
    _assert_equal(record_parity, pair.name, "ragged", joined, torch.cat(theirs))


def test_packed_documents_equal_separate_ones(main_pair: Any, sample_ids: torch.Tensor, record_parity: Record) -> None:
    model = load_model(main_pair.folder)
    # Long documents run one by one, short ones under a mask.
    for mode, borders in (("packed", [0, 70, 160]), ("packed short", [0, 3, 20, 21, 45, 90, 160])):
        spans = list(pairwise(borders))
        segments = torch.cat([torch.full((stop - start,), n) for n, (start, stop) in enumerate(spans)])
        positions = torch.cat([torch.arange(stop - start) for start, stop in spans])
        ours = _run(model, sample_ids, segment_ids_BT=segments.expand(2, -1), positions_BT=positions.expand(2, -1))
        theirs = torch.cat([main_pair.oracle_logits(sample_ids[:, start:stop]) for start, stop in spans], dim=1)
        _assert_equal(record_parity, main_pair.name, mode, ours, theirs)


def _noted(chosen: list[torch.Tensor], *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = route(*args, **options)
    chosen.append(ids)
    return ids, weights


def _as_chosen(
    ids: torch.Tensor, logits: torch.Tensor, *, order: str, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of experts that were chosen before."""
    logits = logits.float()
    if order == "top_k_softmax":
        return ids, logits.gather(-1, ids).softmax(-1)
    weights = logits.softmax(-1).gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) if renormalise else weights


def test_bfloat16_is_as_close_as_bfloat16_can_be(
    main_pair: Any, sample_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(main_pair.folder)
    exact = main_pair.oracle_logits(sample_ids)
    half = load_model(main_pair.folder, dtype=torch.bfloat16)
    if model.config.moe is not None:  # a token that goes to another expert is far away: with the exact choices
        chosen: list[torch.Tensor] = []
        monkeypatch.setattr(moe, "route", lambda *args, **options: _noted(chosen, *args, **options))
        _run(model, sample_ids)
        rounded = iter(chosen * 2)
        monkeypatch.setattr(moe, "route", lambda logits, *_, **options: _as_chosen(next(rounded), logits, **options))
    for ours in (_run(model, sample_ids, compute_dtype=torch.bfloat16), _run(half, sample_ids)):
        relative = float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        assert relative < 0.03  # transformers in bf16 is 0.8 to 1.7 % from its fp32 on these shapes
