"""Pairs for next sentence prediction: half follow, half are from another document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trine.engine.data.masking import Masker, Masking
from trine.engine.data.samples import SampleStream
from trine.engine.data.sentence_pairs import PairRows
from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer

SEQ_LEN = 40


def stream_of(folder: Path, tokenizer: Tokenizer) -> SampleStream:
    assert tokenizer.cls_id is not None
    assert tokenizer.sep_id is not None
    rows = PairRows(
        seq_len=SEQ_LEN,
        masker=Masker(tokenizer, Masking()),
        first_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id or 0,
    )
    return SampleStream([(folder, 1.0)], seq_len=SEQ_LEN, seed=1, rows=rows)


def test_half_of_the_pairs_follow_and_all_are_what_they_say(wordpiece: Path) -> None:
    tokenizer, shards = Tokenizer.load(wordpiece / "tokenizer"), TokenShards.open(wordpiece)
    batch = stream_of(wordpiece, tokenizer).batch(0, 400)
    assert batch.labels_B is not None
    assert batch.token_types_BT is not None
    assert batch.lengths_B is not None
    assert batch.counts[1] == 400
    ids = batch.ids_BT.flatten().clone()
    ids[batch.places_M] = batch.targets_M
    bounds = [shards.document_bounds(number) for number in range(shards.num_documents)]
    documents = [shards.read(begin, end - begin - 1).tolist() for begin, end in bounds]

    def holders(text: list[int]) -> set[int]:
        return {n for n, one in enumerate(documents) for i in range(len(one)) if one[i : i + len(text)] == text}

    follows = 0
    for row, types, length, label in zip(
        ids.view_as(batch.ids_BT).tolist(), batch.token_types_BT.tolist(), batch.lengths_B.tolist(),
        batch.labels_B.tolist(), strict=True,
    ):  # fmt: skip
        border = row.index(tokenizer.sep_id)
        first, second = row[1:border], row[border + 1 : length - 1]
        assert (row[0], row[length - 1]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert types == [0] * (border + 1) + [1] * (length - border - 1) + [0] * (SEQ_LEN - length)
        assert first
        assert second
        if label == 0:
            assert holders(first + second)
            follows += 1
        else:
            assert holders(first)
            assert holders(second)
    # Windows whose longest stretch is a single token have nothing that could follow.
    assert abs(follows - 200) < 3 * np.sqrt(100)


def test_a_pair_belongs_to_its_sample(wordpiece: Path) -> None:
    tokenizer = Tokenizer.load(wordpiece / "tokenizer")
    whole, part = (stream_of(wordpiece, tokenizer).batch(*which) for which in ((0, 20), (11, 5)))
    torch.testing.assert_close(part.ids_BT, whole.ids_BT[11:16])
    assert whole.labels_B is not None
    assert part.labels_B is not None
    torch.testing.assert_close(part.labels_B, whole.labels_B[11:16])


def test_one_document_alone_is_refused(wordpiece: Path, tmp_path: Path, make_prepared: Callable[..., Path]) -> None:
    from trine.engine.data.prepare import prepare

    (tmp_path / "one.txt").write_text("the cat sat on a mat " * 40)
    prepare([tmp_path / "one.txt"], tokenizer_dir=wordpiece / "tokenizer", out=tmp_path / "out")
    stream = stream_of(tmp_path / "out", Tokenizer.load(wordpiece / "tokenizer"))
    with pytest.raises(DataError, match=r"has 1 document in its train split.*give each text a file or line of its own"):
        stream.batch(0, 20)
