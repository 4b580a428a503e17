"""Training samples: any of them at any time, documents kept apart, epochs complete."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.samples import SampleStream
from trine.engine.data.shards import TokenShards
from trine.engine.data.stream import MixedSource
from trine.engine.errors import DataError, UsageError

SEQ_LEN = 16
FIELDS = ("ids_BT", "targets_BT", "segment_ids_BT", "positions_BT")


@pytest.fixture(scope="module")
def other(make_prepared: Callable[..., Path]) -> Path:
    return make_prepared(1000, 40)


@pytest.fixture(scope="module")
def mixed(prepared: Path, other: Path) -> SampleStream:
    return SampleStream([(prepared, 3.0), (other, 1.0)], seq_len=SEQ_LEN, seed=5)


@pytest.fixture(scope="module")
def first_samples(mixed: SampleStream) -> Batch:
    return mixed.batch(0, 2500)


def equal_rows(batch: Batch, whole: Batch, first: int) -> bool:
    rows = slice(first, first + len(batch.ids_BT))
    return all(torch.equal(getattr(batch, name), getattr(whole, name)[rows]) for name in FIELDS)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(first=st.integers(0, 2400), count=st.integers(1, 100))
def test_a_sample_is_the_same_in_every_batch(mixed: SampleStream, first_samples: Batch, first: int, count: int) -> None:
    assert equal_rows(mixed.batch(first, count), first_samples, first)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_any_batch_size_shows_the_same_sequence(mixed: SampleStream, first_samples: Batch, size: int) -> None:
    for first in range(0, min(2500 - size, 60 * size), size):
        assert equal_rows(mixed.batch(first, size), first_samples, first)


def test_a_new_stream_goes_on_where_the_old_one_stopped(prepared: Path, other: Path, first_samples: Batch) -> None:
    again = SampleStream([(prepared, 3.0), (other, 1.0)], seq_len=SEQ_LEN, seed=5)
    assert equal_rows(again.batch(777, 33), first_samples, 777)


def test_an_epoch_visits_every_window_once_from_a_new_offset(prepared: Path) -> None:
    shards = TokenShards.open(prepared)
    tokens = shards.read(0, shards.num_tokens)
    ring = np.concatenate([tokens, tokens])
    stream = SampleStream([(prepared, 1.0)], seq_len=SEQ_LEN, seed=0, document_mask=False)
    size = stream.samples_per_epoch
    assert size == shards.num_tokens // SEQ_LEN
    orders = []
    for epoch in range(3):
        starts = stream._starts(np.zeros(size, dtype=np.int64), np.arange(epoch * size, (epoch + 1) * size))
        offsets = (np.sort(starts) - starts.min()) % shards.num_tokens
        # Windows are SEQ_LEN apart on the ring; only the rest of the division lies between two of them.
        gaps = np.diff(np.append(np.sort(starts), starts.min() + shards.num_tokens))
        assert sorted(gaps.tolist()) == [SEQ_LEN] * (size - 1) + [SEQ_LEN + shards.num_tokens % SEQ_LEN]
        assert len(set(offsets.tolist())) == size
        batch = stream.batch(epoch * size, size)
        for row, start in enumerate(starts.tolist()):
            np.testing.assert_array_equal(batch.ids_BT[row].numpy(), ring[start : start + SEQ_LEN])
            np.testing.assert_array_equal(batch.targets_BT[row].numpy(), ring[start + 1 : start + SEQ_LEN + 1])
        orders.append(starts.tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert len({min(order) % SEQ_LEN for order in orders} | {min(order) for order in orders}) > 1


def test_documents_are_kept_apart(prepared: Path) -> None:
    stream = SampleStream([(prepared, 1.0)], seq_len=64, seed=1)
    batch = stream.batch(0, 40)
    assert batch.segment_ids_BT is not None
    assert batch.positions_BT is not None
    ids, targets = batch.ids_BT.numpy(), batch.targets_BT.numpy()
    eos = TokenShards.open(prepared).eos_id
    for row in range(len(ids)):
        segment, position = 0, 0
        for column in range(64):
            assert batch.segment_ids_BT[row, column] == segment
            assert batch.positions_BT[row, column] == position
            if ids[row, column] == eos:
                assert targets[row, column] == IGNORED
                segment, position = segment + 1, 0
            else:
                assert targets[row, column] != IGNORED
                position += 1
                if column < 63:
                    assert targets[row, column] == ids[row, column + 1]
    assert batch.segment_ids_BT.max() > 1
    assert batch.num_valid == (targets != IGNORED).sum()


def test_without_mask_everything_is_predicted(prepared: Path) -> None:
    batch = SampleStream([(prepared, 1.0)], seq_len=64, seed=1, document_mask=False).batch(0, 10)
    assert batch.segment_ids_BT is None
    assert batch.positions_BT is None
    assert batch.num_valid == 640
    assert batch.num_bytes is None


def test_weights_decide_the_shares(mixed: SampleStream, prepared: Path, other: Path) -> None:
    source, _ = mixed._mixture.assign(np.arange(10_000))
    assert np.bincount(source).tolist() == [7500, 2500]
    assert mixed.num_tokens == TokenShards.open(prepared).num_tokens + TokenShards.open(other).num_tokens


def test_limits_count_epochs_and_tokens_in_whole_samples(prepared: Path, other: Path) -> None:
    windows = TokenShards.open(other).num_tokens // SEQ_LEN
    sources = [MixedSource(prepared, 1.0), MixedSource(other, 1.0, max_epochs=1.5)]
    stream = SampleStream(sources, seq_len=SEQ_LEN, seed=5)
    one, two = stream.uses(10 * windows)
    assert (one.limit, one.ends_at, stream.num_samples) == (None, None, None)
    assert (two.limit, two.samples) == (math.floor(1.5 * windows),) * 2
    assert two.epochs == pytest.approx(1.5, abs=1 / windows)
    assert two.ends_at == stream.endings[0] == pytest.approx(2 * two.samples, abs=2)
    assert one.samples + two.samples == 10 * windows
    capped = SampleStream([MixedSource(prepared, 1.0, 9.0, 7 * SEQ_LEN + 3)], seq_len=SEQ_LEN, seed=5)
    assert capped.num_samples == 7
    assert equal_rows(capped.batch(0, 7), SampleStream([(prepared, 1.0)], seq_len=SEQ_LEN, seed=5).batch(0, 7), 0)
    with pytest.raises(UsageError, match="limits allow 7"):
        capped.batch(5, 3)
    with pytest.raises(UsageError, match=r"max_tokens = 15 of .* allow not even one sample of 16 tokens"):
        SampleStream([MixedSource(prepared, 1.0, None, 15)], seq_len=SEQ_LEN, seed=5)


def test_a_limited_source_shows_each_window_once_an_epoch(prepared: Path, other: Path) -> None:
    windows = TokenShards.open(other).num_tokens // SEQ_LEN
    stream = SampleStream([MixedSource(prepared), MixedSource(other, 2.0, 2.0)], seq_len=SEQ_LEN, seed=5)
    source, index = stream._mixture.assign(np.arange(stream.endings[0]))
    starts = stream._starts(source, index)[source == 1]
    assert sorted(index[source == 1].tolist()) == list(range(2 * windows))
    epochs = [starts[index[source == 1] // windows == epoch] for epoch in (0, 1)]
    assert [len(set(epoch.tolist())) for epoch in epochs] == [windows, windows]


def test_the_fingerprint_names_the_sequence(prepared: Path, other: Path) -> None:
    def fingerprint(
        *sources: MixedSource | tuple[Path, float], seq_len: int = 16, seed: int = 0, document_mask: bool = True
    ) -> str:
        return SampleStream(sources, seq_len=seq_len, seed=seed, document_mask=document_mask).fingerprint

    base = fingerprint((prepared, 1.0), (other, 1.0))
    assert base == fingerprint((prepared, 2.0), (other, 2.0))  # only the ratio counts
    others = [
        fingerprint((other, 1.0), (prepared, 1.0)),
        fingerprint((prepared, 2.0), (other, 1.0)),
        fingerprint((prepared, 1.0), (other, 1.0), seq_len=17),
        fingerprint((prepared, 1.0), (other, 1.0), seed=1),
        fingerprint((prepared, 1.0), (other, 1.0), document_mask=False),
        fingerprint((prepared, 1.0)),
        fingerprint((prepared, 1.0), MixedSource(other, 1.0, max_epochs=2.0)),
        fingerprint(MixedSource(prepared, 1.0, max_tokens=64), (other, 1.0)),
    ]
    assert len({base, *others}) == 9
    assert base == fingerprint(MixedSource(prepared), MixedSource(other))
    # Runs are resumed by later versions: the name of a sequence without limits may not change.
    one, two = (TokenShards.open(folder).fingerprint for folder in (prepared, other))
    identity = f"samples-1 {[(one, 0.5), (two, 0.5)]} 16 0 True"
    assert base == hashlib.sha256(identity.encode()).hexdigest()


def test_seeds_give_different_orders(prepared: Path) -> None:
    one, two = (SampleStream([(prepared, 1.0)], seq_len=16, seed=seed).batch(0, 20) for seed in (0, 1))
    assert not torch.equal(one.ids_BT, two.ids_BT)


def test_impossible_requests_are_refused(prepared: Path, make_prepared: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="sequence length 0"):
        SampleStream([(prepared, 1.0)], seq_len=0, seed=0)
    with pytest.raises(UsageError, match="no data sources"):
        SampleStream([], seq_len=4, seed=0)
    tiny = make_prepared(0, 1)
    num_tokens = TokenShards.open(tiny).num_tokens
    with pytest.raises(DataError, match=f"has {num_tokens} tokens, a sample of length {num_tokens} needs"):
        SampleStream([(tiny, 1.0)], seq_len=num_tokens, seed=0)
    smallest = SampleStream([(tiny, 1.0)], seq_len=num_tokens - 1, seed=0)
    assert smallest.batch(10**12, 3).ids_BT.shape == (3, num_tokens - 1)
    for first, count in ((-1, 1), (0, 0)):
        with pytest.raises(UsageError, match="both should be"):
            smallest.batch(first, count)


def test_batches_move_whole(mixed: SampleStream) -> None:
    batch = mixed.batch(0, 2)
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in FIELDS} == {"meta"}
    assert moved.num_valid == batch.num_valid
