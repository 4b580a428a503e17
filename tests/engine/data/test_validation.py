"""The validation split: each token scored once, bytes counted exactly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from trine.engine.data.batch import IGNORED
from trine.engine.data.shards import TokenShards
from trine.engine.data.validation import ValidationSet
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer


def scored(data: ValidationSet, batch_size: int) -> list[int]:
    return [
        int(target) for batch in data.batches(batch_size) for target in batch.targets_BT.flatten() if target != IGNORED
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("seq_len", [7, 64, 100_000])
def test_each_token_is_scored_once(prepared: Path, seq_len: int, document_mask: bool, batch_size: int) -> None:
    shards = TokenShards.open(prepared, "validation")
    tokens = shards.read(0, shards.num_tokens)
    unscored = shards.document_starts(0, shards.num_tokens) if document_mask else np.array([0])
    expected = np.delete(tokens, unscored).tolist()
    data = ValidationSet([prepared], seq_len=seq_len, document_mask=document_mask)
    assert scored(data, batch_size) == expected
    assert data.num_tokens == len(expected)


def test_bytes_are_those_of_the_scored_tokens(prepared: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    table = tokenizer.token_bytes
    assert table is not None
    for max_tokens in (None, 100):
        data = ValidationSet([prepared], seq_len=16, max_tokens=max_tokens)
        text = b"".join(table[token] for token in scored(data, 4) if token != tokenizer.eos_id)
        assert data.num_bytes == len(text)
        assert sum(batch.num_bytes or 0 for batch in data.batches(5)) == len(text)
    whole = ValidationSet([prepared], seq_len=16)
    first_tokens = sum(
        len(table[TokenShards.open(prepared, "validation").read(int(start), 1)[0]])
        for start in TokenShards.open(prepared, "validation").document_starts(0, 10**6)
    )
    assert whole.num_bytes == TokenShards.open(prepared, "validation").num_bytes - first_tokens
    assert whole.bits_per_byte(math.log(2) * 3 * (whole.num_bytes or 0)) == pytest.approx(3)


def test_a_limit_takes_windows_from_all_over_the_split(prepared: Path) -> None:
    whole = ValidationSet([prepared], seq_len=8)
    part = ValidationSet([prepared], seq_len=8, max_tokens=50)
    assert part.num_windows == 7
    assert part.num_tokens <= 56
    rows = [tuple(row.tolist()) for batch in whole.batches(1) for row in batch.ids_BT]
    chosen = [tuple(row.tolist()) for batch in part.batches(2) for row in batch.ids_BT]
    assert chosen == [rows[i * len(rows) // 7] for i in range(7)]
    assert ValidationSet([prepared], seq_len=8, max_tokens=10**9).num_windows == whole.num_windows
    assert part.fingerprint == ValidationSet([prepared], seq_len=8, max_tokens=50).fingerprint != whole.fingerprint


def test_several_folders_follow_one_another(prepared: Path) -> None:
    one = ValidationSet([prepared], seq_len=16)
    two = ValidationSet([prepared, prepared], seq_len=16)
    assert scored(two, 4) == scored(one, 4) * 2
    assert (two.num_bytes or 0) == 2 * (one.num_bytes or 0)


def test_impossible_requests_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folders for validation"):
        ValidationSet([], seq_len=8)
    with pytest.raises(UsageError, match="max_tokens 0"):
        ValidationSet([prepared], seq_len=8, max_tokens=0)
    with pytest.raises(DataError, match="no prepared data"):
        ValidationSet([tmp_path], seq_len=8)


def test_no_bytes_where_tokens_have_none(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "token_bytes", None)
    data = ValidationSet([prepared], seq_len=16)
    assert data.num_bytes is None
    assert data.bits_per_byte(1.0) is None
    assert data.num_tokens > 0
