"""The loss of encoder-decoders against transformers in float64, pair by pair; packed rows; what a batch holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trine.engine.data.batch import IGNORED
from trine.engine.data.packing import pack
from trine.engine.data.seq2seq import Seq2Seq
from trine.engine.data.seq2seq_batch import Seq2SeqLayout
from trine.engine.model.checkpoint import save_model
from trine.engine.model.families.registry import new_config
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer

CLASSES = {"t5": transformers.T5ForConditionalGeneration, "marian": transformers.MarianMTModel}
LENGTHS = [(5, 3), (9, 7), (2, 2), (4, 8), (7, 1)]


def models(tmp_path: Path, family: str) -> tuple[Transformer, Any]:
    """The same weights in Trine (float32) and in transformers (float64)."""
    sizes = {
        "vocab_size": 50, "width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
        "ffn_width": 64, "max_positions": 24,
    }  # fmt: skip
    settings = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout": 0.0, "dropout_rate": 0.0}
    off = {"forced_eos_token_id": None, "bad_words_ids": None}
    model = Transformer(new_config(family, sizes=sizes, settings={**settings, **off}))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tmp_path)
    return model.eval(), CLASSES[family].from_pretrained(tmp_path, dtype=torch.float64).eval()


def pairs() -> tuple[list[Any], list[Any]]:
    generator = np.random.default_rng(2)
    return tuple(  # type: ignore[return-value]
        [np.append(generator.integers(2, 50, lengths[side] - 1), 1) for lengths in LENGTHS] for side in (0, 1)
    )


def layout(*, packed: bool) -> Seq2SeqLayout:
    return Seq2SeqLayout(start_id=0, pad_id=0, source_len=16, target_len=12, packed=packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", ["t5", "marian"])
def test_loss_is_that_of_each_pair_alone(tmp_path: Path, family: str, smoothing: float, packed: bool) -> None:
    model, theirs = models(tmp_path, family)
    sources, targets = pairs()
    batch = layout(packed=packed).batch(sources, targets)
    assert len(batch.ids_BT) == (2 if packed else 5)
    loss, count = Seq2Seq(label_smoothing=smoothing).loss(model, batch)
    reference = torch.zeros((), dtype=torch.float64)
    for source, target in zip(sources, targets, strict=True):
        read = torch.tensor([[0, *target[:-1]]])
        log_p = theirs(input_ids=torch.tensor(source)[None], decoder_input_ids=read).logits[0].log_softmax(dim=-1)
        right = log_p[torch.arange(len(target)), torch.tensor(target)]
        reference = reference + (-(1 - smoothing) * right - smoothing * log_p.mean(dim=-1)).sum()
    assert count == batch.counts[0] == sum(length for _, length in LENGTHS)
    torch.testing.assert_close(loss.double(), reference, rtol=3e-6, atol=3e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    reference.backward()
    shared = theirs.shared if family == "t5" else theirs.model.shared
    assert model.embed_tokens.weight.grad is not None
    # Of an embedding, transformers' Marian gives the padding id, which begins each target, no gradient.
    rows = slice(1 if family == "marian" else 0, None)
    found, expected = model.embed_tokens.weight.grad.double()[rows], shared.weight.grad[rows]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_pairs_go_to_the_first_row_with_room_on_both_sides() -> None:
    assert pack(LENGTHS, (16, 12)) == [[0, 1, 2], [3, 4]]
    assert pack([(1, 1)] * 3, (1, 9)) == [[0], [1], [2]]


def test_a_batch_holds_all_pairs_and_nothing_else() -> None:
    sources, targets = pairs()
    for packed in (False, True):
        batch = layout(packed=packed).batch(sources, targets)
        assert batch.num_tokens == sum(map(sum, LENGTHS))
        assert batch.source_segments_BS is not None
        assert batch.segment_ids_BT is not None
        found = []
        for row in range(len(batch.ids_BT)):
            kept = batch.targets_BT[row] != IGNORED
            for segment in batch.segment_ids_BT[row][kept].unique().tolist():
                inside, of_source = batch.segment_ids_BT[row] == segment, batch.source_segments_BS[row] == segment
                source, target = batch.source_ids_BS[row][of_source].tolist(), batch.targets_BT[row][inside].tolist()
                assert batch.ids_BT[row][inside].tolist() == [0, *target[:-1]]
                found.append((source, target))
        wanted = [(source.tolist(), target.tolist()) for source, target in zip(sources, targets, strict=True)]
        assert sorted(found) == sorted(wanted)


def test_pairs_of_one_length_need_no_segments() -> None:
    batch = layout(packed=False).batch([np.array([5, 1])] * 3, [np.array([7, 8, 1])] * 3)
    assert batch.source_segments_BS is None
    assert batch.segment_ids_BT is None
