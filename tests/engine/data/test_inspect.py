"""Looking into prepared data: counts by hand, and samples that are those of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trine.engine.data.batch import IGNORED
from trine.engine.data.inspect import inspected_samples, split_statistics
from trine.engine.data.prepare import prepare
from trine.engine.data.samples import SampleStream
from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_characters


def test_counts_are_those_of_the_tokens(
    prepared: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trine.engine.data.inspect._CHUNK_TOKENS", 77)
    shards = TokenShards.open(prepared)
    found = split_statistics(shards, tiny_tokenizer, top=4)
    tokens = shards.read(0, shards.num_tokens).tolist()
    counts = Counter(tokens)
    assert (found.tokens, found.documents, found.bytes) == (len(tokens), shards.num_documents, shards.num_bytes)
    assert found.ids_used == len(counts)
    assert found.unknown_tokens is None
    assert found.bytes_per_token == shards.num_bytes / (len(tokens) - counts[shards.eos_id])
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:4]
    assert [(token.token_id, token.count) for token in found.most_frequent] == expected
    assert found.most_frequent[0].share == expected[0][1] / len(tokens)
    assert found.most_frequent[0].text == tiny_tokenizer.token_text(expected[0][0])


def test_lengths_are_those_of_the_documents(prepared: Path, tiny_tokenizer: Tokenizer) -> None:
    shards = TokenShards.open(prepared)
    ends = [i for i, token in enumerate(shards.read(0, shards.num_tokens).tolist()) if token == shards.eos_id]
    lengths = np.diff([-1, *ends])
    assert np.concatenate(list(shards.document_lengths(chunk=7))).tolist() == lengths.tolist()
    found = split_statistics(shards, tiny_tokenizer, top=0).lengths
    assert (found.least, found.most) == (lengths.min(), lengths.max())
    assert found.mean == pytest.approx(lengths.mean())
    for share, value in ((0.05, found.percentile_5), (0.5, found.median), (0.95, found.percentile_95)):
        assert value == np.quantile(lengths, share, method="inverted_cdf")
    assert sum(count for _, _, count in found.histogram) == len(lengths)
    for low, high, count in found.histogram:
        assert count == ((lengths >= low) & (lengths < high)).sum()


@pytest.mark.parametrize("seed", [0, 3])
def test_samples_are_those_of_training(prepared: Path, tiny_tokenizer: Tokenizer, seed: int) -> None:
    batch = SampleStream([(prepared, 1.0)], seq_len=64, seed=seed).batch(0, 5)
    assert batch.segment_ids_BT is not None
    shards = TokenShards.open(prepared)
    found = list(inspected_samples(prepared, "train", tiny_tokenizer, count=5, seq_len=64, seed=seed))
    for row, sample in enumerate(found):
        assert sample.ids == batch.ids_BT[row].tolist()
        assert sample.targets == batch.targets_BT[row].tolist()
        assert sample.loss == [target != IGNORED for target in sample.targets]
        assert [s.length for s in sample.segments] == np.bincount(batch.segment_ids_BT[row]).tolist()
        assert sum(segment.targets for segment in sample.segments) == sum(sample.loss)
        for segment in sample.segments:
            number, start = shards.document_at((sample.first_token + segment.first_position) % shards.num_tokens)
            assert number == segment.document
            inside = shards.read(start + segment.from_token, segment.length).tolist()
            assert inside == sample.ids[segment.first_position : segment.first_position + segment.length]
            if all(tiny_tokenizer.token_text(i).isascii() for i in inside):
                shown = "".join(text for text, _ in segment.runs)
                assert shown == tiny_tokenizer.decode(inside, skip_special_tokens=False)
            if shards.eos_id in inside[:-1] or (inside[-1] == shards.eos_id and segment is not sample.segments[-1]):
                assert segment.runs[-1] == ("<|endoftext|>", False)
    assert max(len(sample.segments) for sample in found) > 2


def test_validation_windows_follow_each_other(prepared: Path, tiny_tokenizer: Tokenizer) -> None:
    shards = TokenShards.open(prepared, "validation")
    found = list(inspected_samples(prepared, "validation", tiny_tokenizer, count=10**6, seq_len=50, seed=0))
    assert [i for sample in found for i in sample.ids] == shards.read(0, shards.num_tokens - 1).tolist()


def test_few_tokens_and_missing_splits(make_prepared: Callable[..., Path], tiny_tokenizer: Tokenizer) -> None:
    folder = make_prepared(0, 1)
    (sample,) = inspected_samples(folder, "train", tiny_tokenizer, count=1, seq_len=10_000, seed=0)
    assert len(sample.ids) == TokenShards.open(folder).num_tokens - 1
    with pytest.raises(DataError, match="has no validation split"):
        list(inspected_samples(folder, "validation", tiny_tokenizer, count=1, seq_len=8, seed=0))


def test_unknown_tokens_are_counted(tmp_path: Path, make_prepared: Callable[..., Path]) -> None:
    tokenizer = train_characters(["abc"])
    tokenizer.save(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("abcabc")
    prepare([tmp_path / "a.txt"], tokenizer_dir=tmp_path / "tok", out=tmp_path / "out")
    assert split_statistics(TokenShards.open(tmp_path / "out"), tokenizer, top=1).unknown_tokens == 0
    ids = np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u2")
    ids[2] = tokenizer.unk_id
    ids.tofile(tmp_path / "out" / "train-00000.bin")
    assert split_statistics(TokenShards.open(tmp_path / "out"), tokenizer, top=1).unknown_tokens == 1
