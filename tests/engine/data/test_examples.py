"""Labelled examples: what is read, in which order, and that every bad line is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trine.engine.data.batch import IGNORED
from trine.engine.data.example_stream import ExampleStream, ExampleValidation
from trine.engine.data.labels import Labels, gather_labels
from trine.engine.data.pairs import PairTask
from trine.engine.data.seq2seq_batch import Seq2SeqLayout
from trine.engine.data.stream import MixedSource
from trine.engine.data.tagged import TagTask, align
from trine.engine.data.texts import TextTask
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer

Write = Callable[[list[Any]], Path]


@pytest.fixture(scope="module")
def tokenizer(wordpiece: Path) -> Tokenizer:
    return Tokenizer.load(wordpiece / "tokenizer")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(records: list[Any]) -> Path:
        path = tmp_path / "examples.jsonl"
        path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
        return path

    return to_file


def texts_of(tokenizer: Tokenizer, **changes: Any) -> TextTask:
    settings: dict[str, Any] = {
        "seq_len": 12, "pad_id": 0, "text_field": "text", "pair_field": None, "label_field": "label",
        "labels": Labels(["no", "yes"]),
    }  # fmt: skip
    return TextTask(tokenizer=tokenizer, **{**settings, **changes})


def pairs_of(tokenizer: Tokenizer, **changes: Any) -> PairTask:
    layout = Seq2SeqLayout(start_id=0, pad_id=0, source_len=8, target_len=6)
    settings: dict[str, Any] = {"layout": layout, "source_field": "source", "target_field": "target", "eos_id": 3}
    return PairTask(tokenizer=tokenizer, **{**settings, **changes})


def tags_of(tokenizer: Tokenizer, **changes: Any) -> TagTask:
    settings: dict[str, Any] = {
        "seq_len": 12, "pad_id": 0, "words_field": "words", "labels_field": "labels", "labels": Labels(["A", "O"]),
    }  # fmt: skip
    return TagTask(tokenizer=tokenizer, **{**settings, **changes})


def stream_of(path: Path, task: Any, tokenizer: Tokenizer, *, seed: int = 0) -> ExampleStream:
    return ExampleStream([MixedSource(path)], task, tokenizer, tokenizer_dir=path.parent, seed=seed)


def test_every_epoch_shows_every_example_once_in_a_new_order(write: Write, tokenizer: Tokenizer) -> None:
    records = [{"text": f"the cat sat {number}", "label": ("no", "yes")[number % 2]} for number in range(23)]
    stream = stream_of(write(records), texts_of(tokenizer), tokenizer)
    whole = stream.batch(0, 69)
    rows = [tuple(row) for row in whole.ids_BT.tolist()]
    epochs = [rows[0:23], rows[23:46], rows[46:69]]
    assert len(set(epochs[0])) == 23
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for first, count in ((0, 5), (20, 30), (68, 1)):
        part = stream.batch(first, count)
        width = part.ids_BT.shape[1]
        torch.testing.assert_close(part.ids_BT, whole.ids_BT[first : first + count, :width])
        torch.testing.assert_close(part.labels_B, whole.labels_B[first : first + count])
    assert (stream.samples_per_epoch, stream.facts()[0].num_items) == (23, 23)


def test_the_fingerprint_names_data_and_task_not_the_path(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": "the cat", "label": "no"}, {"text": "a mat", "label": "yes"}]
    path = write(records)
    first = stream_of(path, texts_of(tokenizer), tokenizer).fingerprint
    moved = path.rename(tmp_path / "moved.jsonl")
    assert stream_of(moved, texts_of(tokenizer), tokenizer).fingerprint == first
    assert stream_of(moved, texts_of(tokenizer, seq_len=20), tokenizer).fingerprint != first
    assert stream_of(moved, texts_of(tokenizer), tokenizer, seed=1).fingerprint != first
    records[1]["label"] = "no"
    assert stream_of(write(records), texts_of(tokenizer), tokenizer).fingerprint != first


def test_texts_are_encoded_as_transformers_encodes_them(write: Write, tokenizer: Tokenizer, wordpiece: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(wordpiece / "tokenizer")
    records = [
        {"text": "the cat", "second": "sat on a mat", "label": 1},
        {"text": "naïve", "second": "値 cat", "label": 0},
    ]
    task = texts_of(tokenizer, pair_field="second")
    [batch] = ExampleValidation(write(records), task, tokenizer).batches(8)
    texts, seconds = ([record[field] for record in records] for field in ("text", "second"))
    found = theirs(texts, seconds, padding=True, return_tensors="pt", return_token_type_ids=True)
    torch.testing.assert_close(batch.ids_BT, found["input_ids"])
    torch.testing.assert_close(batch.token_types_BT, found["token_type_ids"])
    torch.testing.assert_close(batch.lengths_B, found["attention_mask"].sum(1))
    assert batch.labels_B.tolist() == [1, 0]


def test_the_first_token_of_a_word_bears_its_label(write: Write, tokenizer: Tokenizer, wordpiece: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(wordpiece / "tokenizer")
    words, labels = ["cat", "secondcat", "on", "matmat"], ["A", "O", "A", "A"]
    [batch] = ExampleValidation(write([{"words": words, "labels": labels}]), tags_of(tokenizer), tokenizer).batches(8)
    found = theirs(words, is_split_into_words=True)
    assert batch.ids_BT[0].tolist() == found["input_ids"]
    of_word = found.word_ids()
    firsts = [of_word.index(word) for word in range(4)]
    assert len(found["input_ids"]) > 6, "some word takes several tokens"
    assert batch.places_M.tolist() == firsts
    assert batch.targets_M.tolist() == [0, 1, 0, 0]
    assert align([7, 8], [None, 0, 0, 1, None]) == [IGNORED, 7, IGNORED, 8, IGNORED]


def test_pairs_end_with_end_of_text(write: Write, tokenizer: Tokenizer) -> None:
    path = write([{"source": "the cat", "target": "a mat"}])
    [batch] = ExampleValidation(path, pairs_of(tokenizer), tokenizer).batches(8)
    assert batch.source_ids_BS[0].tolist() == [*tokenizer.encode("the cat"), 3]
    assert batch.targets_BT[0].tolist() == [*tokenizer.encode("a mat"), 3]


LONG = "the cat sat on a mat and the cat sat on a mat"
GOOD_TEXT, GOOD_PAIR = {"text": "a", "label": "no"}, {"source": "a", "target": "a"}
BAD: list[tuple[str, Any, str]] = [
    ("texts", "{", r":2: not valid JSON \(.*, column 2\)"),
    ("texts", "", r":2: the line is empty"),
    ("texts", "[1]", r":2: a JSON object is expected, not list"),
    ("texts", {"txt": "a", "label": "no"}, r":2: no field 'text'; the line has 'txt', 'label': name the right one"),
    ("texts", {"text": 3, "label": "no"}, r":2: field 'text' should be text, not int"),
    ("texts", {"text": "", "label": "no"}, r":2: field 'text' is empty"),
    ("texts", '{"text": "\\ud800", "label": "no"}', r":2: field 'text' holds half a surrogate pair"),
    ("texts", {"text": "a", "label": "maybe"}, r":2: label 'maybe' is none of the 2 labels \(no, yes\)"),
    ("texts", {"text": "a", "label": 2}, r":2: label 2 is out of range for 2 labels \(0 to 1: no, yes\)"),
    ("texts", {"text": "a", "label": True}, r":2: label True should be a name or a whole number"),
    ("texts", {"text": LONG, "label": "no"}, r":2: the text has \d+ tokens, data.seq_len leaves room for 12"),
    ("numbers", {"text": "a", "label": "no"}, r":2: field 'label' should be a finite number, not 'no'"),
    ("pairs", {"source": LONG, "target": "a"}, r":2: field 'source' has \d+ tokens, data.seq_len leaves room for 7"),
    ("pairs", {"source": "a", "target": LONG}, r":2: field 'target' has \d+ tokens, data.target_len leaves room for 5"),
    ("tags", {"words": ["a", "cat"], "labels": ["O"]}, r":2: 2 words in 'words', but 1 labels in 'labels'"),
    ("tags", {"words": "a cat", "labels": ["O"]}, r":2: field 'words' should be a list of words"),
    ("tags", {"words": ["a", "\x07"], "labels": ["O", "O"]}, r":2: the tokenizer has no token for the word '\\x07'"),
    ("tags", {"words": LONG.split(), "labels": ["O"] * 13}, r":2: the words are \d+ tokens"),
]


@pytest.mark.parametrize(("kind", "line", "message"), BAD, ids=[f"{kind}-{message[4:24]}" for kind, _, message in BAD])
def test_a_bad_line_is_named(write: Write, tokenizer: Tokenizer, kind: str, line: Any, message: str) -> None:
    tasks: dict[str, tuple[Any, Any]] = {
        "texts": (texts_of(tokenizer), GOOD_TEXT),
        "numbers": (texts_of(tokenizer, labels=None), {**GOOD_TEXT, "label": 1}),
        "pairs": (pairs_of(tokenizer), GOOD_PAIR), "tags": (tags_of(tokenizer), {"words": ["a"], "labels": ["O"]}),
    }  # fmt: skip
    task, good = tasks[kind]
    with pytest.raises(DataError, match=message) as caught:
        ExampleValidation(write([good, line, good]), task, tokenizer)
    assert "\n" not in str(caught.value)


def test_long_texts_are_cut_where_that_is_asked_for(write: Write, tokenizer: Tokenizer) -> None:
    [batch] = ExampleValidation(
        write([{"text": LONG, "label": 0}]), texts_of(tokenizer, truncate=True), tokenizer
    ).batches(1)
    ids = batch.ids_BT[0].tolist()
    assert (len(ids), ids[0], ids[-1]) == (12, tokenizer.cls_id, tokenizer.sep_id)
    words = {"words": LONG.split(), "labels": ["A"] * 13}
    [tagged] = ExampleValidation(write([words]), tags_of(tokenizer, truncate=True), tokenizer).batches(1)
    assert (tagged.ids_BT.shape[1], tagged.ids_BT[0, -1].item()) == (12, tokenizer.sep_id)
    [pair] = ExampleValidation(
        write([{"source": LONG, "target": LONG}]), pairs_of(tokenizer, truncate=True), tokenizer
    ).batches(1)
    assert (pair.source_ids_BS.shape[1], pair.targets_BT.shape[1]) == (8, 6)
    assert pair.source_ids_BS[0, -1] == pair.targets_BT[0, -1] == 3


def test_labels_of_the_data_are_names_in_order_or_numbers(tokenizer: Tokenizer) -> None:
    assert gather_labels([("a", "x"), ("b", "c"), ("c", "x")]).names == ("c", "x")
    assert gather_labels([("a", 0), ("b", 3)]).names == ("0", "1", "2", "3")
    with pytest.raises(DataError, match="names at b and numbers at a"):
        gather_labels([("a", 0), ("b", "x")])
    with pytest.raises(DataError, match="label -1 is negative"):
        gather_labels([("a", -1)])


def test_a_limit_in_tokens_and_other_files_are_refused(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write([GOOD_TEXT])
    with pytest.raises(UsageError, match="give max_epochs"):
        ExampleStream([MixedSource(path, 1.0, None, 5)], texts_of(tokenizer), tokenizer, tokenizer_dir=tmp_path, seed=0)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"files that end in \.jsonl"):
        ExampleValidation(tmp_path / "a.txt", texts_of(tokenizer), tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        ExampleValidation(tmp_path / "empty.jsonl", texts_of(tokenizer), tokenizer)


def test_a_part_of_an_evaluation_set_is_spread_over_it(write: Write, tokenizer: Tokenizer) -> None:
    path = write([{"text": "a", "label": n % 2} for n in range(10)])
    found = ExampleValidation(path, texts_of(tokenizer), tokenizer, max_examples=4)
    labels = np.concatenate([batch.labels_B.numpy() for batch in found.batches(3)])
    assert labels.tolist() == [0, 0, 1, 1]  # numbers 0, 2, 5, 7
