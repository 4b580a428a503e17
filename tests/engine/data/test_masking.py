"""Masked language modelling: what is hidden, how often, and always the same for a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trine.engine.data.encoder_batch import EncoderBatch
from trine.engine.data.masking import MaskedRows, Masker, Masking, WordBorders
from trine.engine.data.samples import SampleStream
from trine.engine.data.shards import TokenShards
from trine.engine.data.validation import ValidationSet
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer

SEQ_LEN = 48


def rows_of(folder: Path, *, document_mask: bool = True, **masking: float | bool) -> MaskedRows:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert tokenizer.pad_id is not None
    masker = Masker(tokenizer, Masking(**masking))  # type: ignore[arg-type]
    return MaskedRows(
        seq_len=SEQ_LEN, document_mask=document_mask, masker=masker, first_id=tokenizer.cls_id, pad_id=tokenizer.pad_id
    )


def stream_of(folder: Path, **options: bool | float) -> SampleStream:
    return SampleStream([(folder, 1.0)], seq_len=SEQ_LEN, seed=3, rows=rows_of(folder, **options))  # type: ignore[arg-type]


def truth(batch: EncoderBatch) -> torch.Tensor:
    """The rows as they are without anything hidden."""
    assert batch.places_M is not None
    assert batch.targets_M is not None
    ids = batch.ids_BT.flatten().clone()
    ids[batch.places_M] = batch.targets_M
    return ids.view_as(batch.ids_BT)


@pytest.mark.parametrize("fraction", [0.15, 0.3])
def test_shares_are_those_asked_for_within_three_sigma(wordpiece: Path, fraction: float) -> None:
    tokenizer = Tokenizer.load(wordpiece / "tokenizer")
    batch = stream_of(wordpiece, document_mask=False, fraction=fraction).batch(0, 1500)
    before, after = truth(batch).flatten(), batch.ids_BT.flatten()
    text = ~torch.isin(before, torch.tensor(sorted(tokenizer.special_ids)))
    count, [chosen] = int(text.sum()), batch.counts
    assert abs(chosen - fraction * count) < 3 * np.sqrt(count * fraction * (1 - fraction))
    targets, shown = before[batch.places_M], after[batch.places_M]
    hidden = int((shown == tokenizer.mask_id).sum())
    # A random token is the right one, or the mask itself, once in 120 times.
    for found, share in ((hidden, 0.8 + 0.1 / 120), (int((shown == targets).sum()), 0.1 + 0.1 / 120)):
        assert abs(found - share * chosen) < 3 * np.sqrt(chosen * share * (1 - share))
    others = shown[(shown != tokenizer.mask_id) & (shown != targets)]
    expected = len(others) / (tokenizer.vocab_size - 2)
    counts = torch.bincount(others, minlength=tokenizer.vocab_size)
    counts = counts[torch.arange(tokenizer.vocab_size) != tokenizer.mask_id]
    freedom = tokenizer.vocab_size - 2
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - freedom) < 4 * np.sqrt(2 * freedom)


def test_special_tokens_are_never_chosen_and_others_stay(wordpiece: Path) -> None:
    tokenizer = Tokenizer.load(wordpiece / "tokenizer")
    batch = stream_of(wordpiece, fraction=0.5).batch(0, 50)
    assert batch.targets_M is not None
    assert not set(batch.targets_M.tolist()) & tokenizer.special_ids
    assert (truth(batch)[:, 0] == (tokenizer.cls_id or 0)).all()


def test_a_whole_word_is_chosen_or_none_of_it(wordpiece: Path) -> None:
    tokenizer = Tokenizer.load(wordpiece / "tokenizer")
    batch = stream_of(wordpiece, document_mask=False, whole_words=True).batch(0, 300)
    assert batch.places_M is not None
    chosen = torch.zeros(batch.ids_BT.numel(), dtype=torch.bool)
    chosen[batch.places_M] = True
    names = {number: name for name, number in tokenizer.vocabulary.items()}
    words = pieces = 0
    for row, marks in zip(truth(batch).tolist(), chosen.view_as(batch.ids_BT).tolist(), strict=True):
        for place in range(1, len(row)):
            if names[row[place]].startswith("##") and row[place - 1] not in tokenizer.special_ids:
                assert marks[place] == marks[place - 1]
                pieces += 1
            elif not names[row[place]].startswith("##") and row[place] not in tokenizer.special_ids:
                words += 1
    starts = sum(not names[token].startswith("##") for token in truth(batch).flatten()[chosen].tolist())
    assert pieces > 500
    assert abs(starts - 0.15 * words) < 3 * np.sqrt(words * 0.15 * 0.85)


def test_words_of_a_byte_level_tokenizer_are_runs_of_letters(tiny_tokenizer: Tokenizer) -> None:
    borders = WordBorders(tiny_tokenizer)
    text = "    return first+2nd naïve 値 x_y"
    ids = np.array(tiny_tokenizer.encode(text))
    bytes_of = tiny_tokenizer.token_bytes
    assert bytes_of is not None
    found: dict[int, bytes] = {}
    for token, number in zip(ids.tolist(), borders.number(ids).tolist(), strict=True):
        found[number] = found.get(number, b"") + bytes_of[token]
    joined = [part.decode() for part in found.values()]
    assert "".join(joined) == text
    assert {"return", "first", "2nd", "naïve", "値", "x"} <= {part.strip(" +_") for part in joined}


def test_documents_in_a_row_are_apart_each_with_its_own_beginning(wordpiece: Path) -> None:
    tokenizer = Tokenizer.load(wordpiece / "tokenizer")
    batch = stream_of(wordpiece).batch(0, 40)
    assert batch.segment_ids_BT is not None
    assert batch.positions_BT is not None
    rows = truth(batch)
    begins = rows.eq(tokenizer.cls_id or 0)
    assert begins.sum() > 60
    torch.testing.assert_close(batch.segment_ids_BT, begins.cumsum(1) - 1)
    assert (batch.positions_BT[begins] == 0).all()
    ends = rows[:, :-1].eq(tokenizer.sep_id or 0)
    assert begins[:, 1:][ends].all()


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_sample_is_the_same_in_every_batch_and_another_in_the_next_epoch(
    wordpiece: Path, document_mask: bool
) -> None:
    stream = stream_of(wordpiece, document_mask=document_mask)
    whole = stream.batch(0, 30)
    for first, count in ((0, 7), (13, 17), (29, 1)):
        part = stream_of(wordpiece, document_mask=document_mask).batch(first, count)
        torch.testing.assert_close(part.ids_BT, whole.ids_BT[first : first + count])
    size = stream.samples_per_epoch
    again = stream.batch(size, size)
    assert not torch.equal(stream.batch(0, size).ids_BT, again.ids_BT)


def test_without_a_mask_between_documents_an_epoch_shows_each_token_once(wordpiece: Path) -> None:
    shards = TokenShards.open(wordpiece)
    stream = stream_of(wordpiece, document_mask=False)
    size = stream.samples_per_epoch
    assert size == shards.num_tokens // (SEQ_LEN - 1)
    shown = truth(stream.batch(0, size))[:, 1:].flatten()
    counts = np.bincount(shards.read(0, shards.num_tokens), minlength=120)
    missing = counts - np.bincount(shown.numpy(), minlength=120)
    assert (missing >= 0).all()
    assert missing.sum() == shards.num_tokens % (SEQ_LEN - 1)


def test_an_evaluation_hides_the_same_every_time(wordpiece: Path) -> None:
    held_out = ValidationSet([wordpiece], seq_len=SEQ_LEN, rows=rows_of(wordpiece))
    one, two = ([batch.ids_BT for batch in held_out.batches(size)] for size in (3, 5))
    torch.testing.assert_close(torch.cat(one), torch.cat(two))
    last = next(iter(held_out.batches(1000)))
    assert last.segment_ids_BT is not None
    assert (last.segment_ids_BT[-1] == SEQ_LEN).any(), "the last window is shorter: its row is padded"
    assert last.num_tokens < last.ids_BT.numel()


def test_a_tokenizer_without_a_mask_token_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"names no mask_token.*--roles encoder"):
        Masker(tiny_tokenizer, Masking())


def test_what_decides_about_rows_is_part_of_the_fingerprint(wordpiece: Path) -> None:
    kinds: tuple[dict[str, Any], ...] = ({}, {"fraction": 0.3}, {"whole_words": True}, {"document_mask": False})
    assert len({stream_of(wordpiece, **kind).fingerprint for kind in kinds}) == 4
