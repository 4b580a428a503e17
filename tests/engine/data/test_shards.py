"""Reading shards: across borders, and refusing what is damaged or does not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from trine.engine.data.shards import TokenShards, open_together
from trine.engine.errors import DataError
from trine.engine.text.tokenizer import Tokenizer


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "damaged"))


def test_reads_run_across_shard_borders(prepared: Path) -> None:
    shards = TokenShards.open(prepared)
    files = sorted(path for path in prepared.glob("train-0*.bin"))
    assert len(files) > 2
    stream = np.concatenate([np.fromfile(path, dtype="<u2") for path in files])
    for start, count in ((0, shards.num_tokens), (499, 2), (500, 500), (3, 1200), (shards.num_tokens, 0), (7, 0)):
        tokens = shards.read(start, count)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, stream[start : start + count])
    for start, count in ((-1, 2), (0, shards.num_tokens + 1), (5, -1)):
        with pytest.raises(IndexError):
            shards.read(start, count)


def test_document_starts_follow_each_end_of_text(prepared: Path) -> None:
    shards = TokenShards.open(prepared)
    tokens = shards.read(0, shards.num_tokens)
    expected = np.concatenate([[0], np.flatnonzero(tokens == shards.eos_id) + 1])[:-1]
    np.testing.assert_array_equal(shards.document_starts(0, shards.num_tokens), expected)
    inside = expected[(expected >= 100) & (expected < 300)]
    np.testing.assert_array_equal(shards.document_starts(100, 200), inside)
    assert len(expected) == shards.num_documents


def test_num_bytes_is_that_of_the_text(prepared: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    for split in ("train", "validation"):
        shards = TokenShards.open(prepared, split)  # type: ignore[arg-type]
        text = tokenizer.decode(shards.read(0, shards.num_tokens).tolist())
        assert shards.num_bytes == len(text.encode())


def test_missing_parts_are_named(prepared: Path, damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared data in .*trine data prepare"):
        TokenShards.open(tmp_path)
    (damaged / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin is missing"):
        TokenShards.open(damaged)
    (damaged / "validation-documents.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"validation-documents\.bin has 0 bytes instead of"):
        TokenShards.open(damaged, "validation")
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="has no validation split; prepare it with --validation"):
        TokenShards.open(damaged, "validation")
    for content, complaint in (("{", "cannot be read"), ('{"version": 99}', "format version 99"), ("[]", "cannot be")):
        (damaged / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=complaint):
            TokenShards.open(damaged)


def test_verify_finds_a_changed_token(prepared: Path, damaged: Path) -> None:
    TokenShards.open(prepared, "validation").verify()
    shards = TokenShards.open(damaged)
    shards.verify()
    content = bytearray((damaged / "train-00001.bin").read_bytes())
    content[10] ^= 1
    (damaged / "train-00001.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"the train split of .* is damaged"):
        TokenShards.open(damaged).verify()


def test_folders_with_different_tokenizers_do_not_mix(prepared: Path, damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "f" * 64
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="were prepared with different tokenizers"):
        open_together([prepared, damaged], "train")
