"""The logits of encoder-decoders equal those of transformers: fp32, at most 2e-5 * max(1, logit scale) apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers

from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model
from trine.engine.model.cross_attention import Source
from trine.engine.model.families import FAMILIES
from trine.engine.model.transformer import Transformer

Record = Callable[[str, str, float, float], None]


def _assert_equal(record: Record, name: str, mode: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference, tolerance = float((ours - theirs).abs().max()), 2e-5 * max(1.0, float(theirs.abs().max()))
    record(name, mode, difference, tolerance)
    assert difference <= tolerance


def _run(model: Transformer, source: Source, target_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(target_ids, source=source, **options))


def _encode(model: Transformer, source_ids: torch.Tensor, **options: Any) -> Source:
    with torch.no_grad():
        return model.encode(source_ids, **options)


def test_prefill_equals_transformers(
    pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    model = load_model(pair.folder)
    ours = _run(model, _encode(model, source_ids), target_ids)
    _assert_equal(record_parity, pair.name, "prefill", ours, pair.oracle_logits(source_ids, target_ids))


def test_training_forward_equals_transformers(
    main_pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    model = load_model(main_pair.folder)  # recording gradients joins q, k, v; dropout is off
    ours = model.logits(model(target_ids, source=model.encode(source_ids))).detach()
    _assert_equal(record_parity, main_pair.name, "training", ours, main_pair.oracle_logits(source_ids, target_ids))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("name", ["t5_v10", "t5_v11", "marian"])
def test_gradients_equal_transformers(
    make_pair: Callable[[str], Any],
    source_ids: torch.Tensor,
    target_ids: torch.Tensor,
    name: str,
    checkpoint_activations: bool,
) -> None:
    pair = make_pair(name)
    model = load_model(pair.folder)
    lengths, targets = torch.tensor([24, 17]), target_ids[:, :20]
    options: dict[str, Any] = {"checkpoint_activations": checkpoint_activations}
    source = model.encode(source_ids[:, :24], lengths_B=lengths, **options)
    logits = model.logits(model(targets[:, :-1], source=source, **options))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()).backward()
    theirs, exact = (
        _oracle_gradients(pair.oracle, dtype, source_ids[:, :24], lengths, targets)
        for dtype in (torch.float32, torch.float64)
    )
    for rule in FAMILIES[model.config.family].rules(model.config):
        # The bias of each logit is a buffer in transformers and has no gradient there.
        if rule.stored != "final_logits_bias":
            ours, wanted = model.get_parameter(rule.ours[0]).grad, exact[rule.stored]
            assert ours is not None
            # Rounding errors grow on their way back through a small model: as far as those of transformers, no further.
            largest = float(wanted.abs().max())
            bound = 2 * float((theirs[rule.stored] - wanted).abs().max()) + 2e-6 * max(0.05, largest)
            torch.testing.assert_close(ours.double(), wanted, rtol=0.0, atol=bound)
    norms = [p.grad.norm() for n, p in model.named_parameters() if p.grad is not None and n != "lm_bias"]
    total = torch.stack(norms).norm()
    total_oracle = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    torch.testing.assert_close(total, total_oracle, rtol=1e-5, atol=0.0)


def _oracle_gradients(
    oracle: torch.nn.Module,
    dtype: torch.dtype,
    source_ids: torch.Tensor,
    lengths: torch.Tensor,
    targets: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Gradients of the oracle's parameters, by name, computed in a dtype."""
    oracle = copy.deepcopy(oracle).to(dtype)
    oracle.zero_grad()
    mask = (torch.arange(source_ids.shape[1]) < lengths[:, None]).long()
    output = oracle(input_ids=source_ids, attention_mask=mask, decoder_input_ids=targets[:, :-1])
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}


def test_cached_decoding_equals_transformers(
    pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    model = load_model(pair.folder)
    lengths, ids = torch.tensor([150, 63]), target_ids[:, :100]
    source = _encode(model, source_ids, lengths_B=lengths).keeping()
    cache = KVCache(model.config, 2, 100)
    parts = [_run(model, source, ids[:, :80], cache=cache)]
    parts += [_run(model, source, ids[:, t : t + 1], cache=cache) for t in range(80, 100)]
    theirs = pair.oracle_logits(source_ids, ids, lengths)
    _assert_equal(record_parity, pair.name, "decode", torch.cat(parts, dim=1), theirs)
    assert source.kept is not None
    assert sorted(source.kept) == list(range(model.config.num_layers))


def test_target_in_pieces_equals_transformers(
    main_pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    model = load_model(main_pair.folder)
    source, ids = _encode(model, source_ids).keeping(), target_ids[:, :80]
    cache = KVCache(model.config, 2, 80)
    parts = [_run(model, source, ids[:, t : t + 7], cache=cache) for t in range(0, 80, 7)]
    _assert_equal(
        record_parity, main_pair.name, "chunks 7", torch.cat(parts, dim=1), main_pair.oracle_logits(source_ids, ids)
    )


def test_ragged_batch_equals_single_texts(
    main_pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    """Sources and targets of other lengths in each row, decoded from there."""
    model = load_model(main_pair.folder)
    source_lengths, lengths, new = [31, 5, 150], [9, 30, 1], 4
    sources = torch.cat([source_ids, source_ids.flip(1)[:1]])
    rows = torch.cat([target_ids, target_ids.flip(1)[:1]])
    source = _encode(model, sources, lengths_B=torch.tensor(source_lengths)).keeping()
    cache = KVCache(model.config, 3, max(lengths) + new)
    prefill = _run(model, source, rows[:, : max(lengths)], cache=cache)
    cache.lengths_B = torch.tensor(lengths)
    ours = [[prefill[row, :length]] for row, length in enumerate(lengths)]
    for t in range(new):
        step = torch.stack([rows[row, length + t] for row, length in enumerate(lengths)])[:, None]
        logits = _run(model, source, step, cache=cache)
        for row in range(3):
            ours[row].append(logits[row])
    theirs = [
        main_pair.oracle_logits(sources[row : row + 1, : source_lengths[row]], rows[row : row + 1, : length + new])[0]
        for row, length in enumerate(lengths)
    ]
    joined = torch.cat([torch.cat(parts) for parts in ours])
    _assert_equal(record_parity, main_pair.name, "ragged", joined, torch.cat(theirs))


def test_packed_pairs_equal_separate_ones(
    main_pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    model = load_model(main_pair.folder)
    borders, target_borders = [0, 3, 70, 110, 150], [0, 20, 21, 90, 140]

    def packed(borders: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        spans = list(pairwise(borders))
        segments = torch.cat([torch.full((stop - start,), n) for n, (start, stop) in enumerate(spans)])
        return segments.expand(2, -1), torch.cat([torch.arange(stop - start) for start, stop in spans]).expand(2, -1)

    (segments, positions), (target_segments, target_positions) = packed(borders), packed(target_borders)
    source = _encode(model, source_ids, segment_ids_BS=segments, positions_BS=positions)
    ours = _run(model, source, target_ids, segment_ids_BT=target_segments, positions_BT=target_positions)
    theirs = [
        main_pair.oracle_logits(source_ids[:, start:stop], target_ids[:, first:last])
        for (start, stop), (first, last) in zip(pairwise(borders), pairwise(target_borders), strict=True)
    ]
    _assert_equal(record_parity, main_pair.name, "packed", ours, torch.cat(theirs, dim=1))


def test_rows_that_share_a_source_equal_rows_with_their_own(
    main_pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor, record_parity: Record
) -> None:
    model = load_model(main_pair.folder)
    lengths = torch.tensor([40, 12])
    source = _encode(model, source_ids[:, :40], lengths_B=lengths).keeping()
    rows = torch.cat([target_ids[:, :9], target_ids[:, 9:18], target_ids[:, 18:27]])
    ours = _run(model, source, rows)
    repeated = source_ids[:, :40].repeat_interleave(3, dim=0)
    theirs = main_pair.oracle_logits(repeated, rows, lengths.repeat_interleave(3))
    _assert_equal(record_parity, main_pair.name, "shared", ours, theirs)
    second = source.rows(torch.tensor([1]))
    _assert_equal(record_parity, main_pair.name, "shared", _run(model, second, rows[3:]), theirs[3:])


@pytest.mark.parametrize("name", ["t5_v10", "marian"])
def test_bfloat16_is_as_close_as_bfloat16_can_be(
    make_pair: Callable[[str], Any], source_ids: torch.Tensor, target_ids: torch.Tensor, name: str
) -> None:
    pair = make_pair(name)
    exact = pair.oracle_logits(source_ids, target_ids)
    oracle = transformers.AutoModelForSeq2SeqLM.from_pretrained(pair.folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = oracle(input_ids=source_ids, decoder_input_ids=target_ids).logits.float()
    half = load_model(pair.folder, dtype=torch.bfloat16)
    ours = _run(half, _encode(half, source_ids), target_ids)

    def away(logits: torch.Tensor) -> float:
        return float((logits - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert away(ours) < 1.2 * away(theirs)
