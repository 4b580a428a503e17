"""Span corruption: lengths, shares, and that nothing of the text is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.engine.data.batch import IGNORED
from trine.engine.data.samples import SampleStream
from trine.engine.data.seq2seq_batch import Seq2SeqLayout
from trine.engine.data.shards import TokenShards
from trine.engine.data.spans import Noise, SpanRows, corrupt, sentinels_of
from trine.engine.data.validation import ValidationSet
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import with_roles

SENTINELS = np.arange(999, 899, -1)


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text of a source and its target: each sentinel replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= 900:
            spans[token] = []
        else:
            spans[max(spans, key=list(spans).index)].append(token)
    return [one for token in source for one in (spans[token] if token >= 900 else [token])]


def test_lengths_are_those_of_t5() -> None:
    assert Noise().text_len(512) == 568
    assert Noise().lengths(568) == (512, 114)
    assert Noise().counts(568) == (85, 28)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(length=st.integers(2, 300), density=st.floats(0.01, 0.95), mean=st.floats(1, 10), key=st.integers(0, 2**63))
def test_source_and_target_give_the_text_back(length: int, density: float, mean: float, key: int) -> None:
    noise = Noise(density=density, mean_span=mean)
    tokens = np.arange(length) % 900
    hidden = noise.hide(length, key=key)
    count, spans = noise.counts(length)
    if spans > len(SENTINELS):
        return
    assert hidden.sum() == count
    assert not hidden[0]
    assert hidden[-1]
    source, target = corrupt(tokens, hidden, SENTINELS)
    assert restored(source.tolist(), target.tolist()) == tokens.tolist()
    assert (len(source) + 1, len(target) + 1) == noise.lengths(length)
    marks = source[source >= 900].tolist()
    assert marks == target[target >= 900].tolist() == SENTINELS[:spans].tolist()


def test_every_way_of_cutting_is_as_likely() -> None:
    noise = Noise(density=0.4, mean_span=2.0)  # 4 of 10 tokens in 2 spans: 3 ways of cutting them, 5 of the rest
    found = ["".join(map(str, noise.hide(10, key=key).astype(int).tolist())) for key in range(3000)]
    counts = np.array([found.count(one) for one in sorted(set(found))])
    assert len(counts) == 15
    assert abs(((counts - 200) ** 2 / 200).sum() - 14) < 3 * np.sqrt(28)


def rows_of(tokenizer: Tokenizer, source_len: int, **noise: float) -> SpanRows:
    assert tokenizer.pad_id is not None
    assert tokenizer.eos_id is not None
    layout = Seq2SeqLayout(start_id=tokenizer.pad_id, pad_id=tokenizer.pad_id, source_len=source_len, target_len=99)
    return SpanRows(noise=Noise(**noise), layout=layout, sentinels=sentinels_of(tokenizer), eos_id=tokenizer.eos_id)


@pytest.fixture(scope="module")
def spanned(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trine.engine.data.prepare import prepare

    folder = tmp_path_factory.mktemp("spanned")
    with_roles(tiny_tokenizer, "encoder-decoder", sentinels=10).save(folder / "tokenizer")
    for name, count in (("train", 60), ("held-out", 7)):
        (folder / f"{name}.txt").write_text("def add(first, second):\n    return first + second\n" * count)
    prepare(
        [folder / "train.txt"], validation_files=[folder / "held-out.txt"], tokenizer_dir=folder / "tokenizer",
        out=folder / "out",
    )  # fmt: skip
    return folder / "out"


def test_rows_fill_the_source_and_hold_the_windows(spanned: Path) -> None:
    tokenizer, shards = Tokenizer.load(spanned / "tokenizer"), TokenShards.open(spanned)
    rows = rows_of(tokenizer, 32)
    stream = SampleStream([(spanned, 1.0)], seq_len=32, seed=0, rows=rows)
    batch = stream.batch(0, 6)
    assert batch.source_ids_BS.shape == (6, 32)
    assert batch.source_segments_BS is None
    assert batch.segment_ids_BT is None
    assert batch.targets_BT.shape == (6, Noise().lengths(rows.window_len)[1])
    assert (batch.ids_BT[:, 0] == tokenizer.pad_id).all()
    assert (batch.ids_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
    ring = np.concatenate([shards.read(0, shards.num_tokens)] * 2)
    top = tokenizer.vocab_size - 1
    for row, (_, start) in enumerate(stream.places(0, 6)):
        sides = [side[row].tolist() for side in (batch.source_ids_BS, batch.targets_BT)]
        assert [side[-1] for side in sides] == [tokenizer.eos_id] * 2
        # As `restored` wants them: sentinels from 999 down.
        source, target = ([t + 999 - top if t > top - 10 else t for t in side[:-1]] for side in sides)
        assert restored(source, target) == ring[start : start + rows.window_len].tolist()


def test_the_rest_of_a_split_is_padded_apart(spanned: Path) -> None:
    rows = rows_of(Tokenizer.load(spanned / "tokenizer"), 32)
    held_out = ValidationSet([spanned], seq_len=32, rows=rows)
    [batch] = held_out.batches(100)
    assert batch.source_segments_BS is not None
    assert (batch.targets_BT[-1] == IGNORED).any()
    assert batch.counts == (int((batch.targets_BT != IGNORED).sum()),)


def test_too_few_sentinels_and_sentinels_elsewhere_are_refused(spanned: Path, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"has 11 hidden spans, but the tokenizer has 10 sentinels"):
        rows_of(Tokenizer.load(spanned / "tokenizer"), 192)
    with pytest.raises(UsageError, match=r"data.seq_len = 2 leaves no room"):
        rows_of(Tokenizer.load(spanned / "tokenizer"), 2)
    with pytest.raises(DataError, match=r"no sentinels.*--roles encoder-decoder"):
        sentinels_of(tiny_tokenizer)
    upside_down = with_roles(with_roles(tiny_tokenizer, "encoder-decoder", sentinels=2), "encoder")
    with pytest.raises(DataError, match=r"counted down from the end of the vocabulary"):
        sentinels_of(upside_down)
