"""`trine tokenizer train`: what it writes, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trine.engine.text.tokenizer import Tokenizer

Succeeds = Callable[..., str]
Trine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("def f(x):\n    return x + 1\n" * 20)
    (tmp_path / "text" / "b.md").write_text("Z" * 50)
    return tmp_path / "text"


def test_train_writes_a_tokenizer(succeeds: Succeeds, text: Path, tmp_path: Path) -> None:
    output = succeeds("tokenizer", "train", text, "--vocab-size", 270, "--out", tmp_path / "tok")
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.vocab_size == 270
    assert f"270 ids, fingerprint {tokenizer.fingerprint[:12]}" in output
    assert re.search(r"^learning merges for 270 ids\nlearned 13 merges in [\d.]+ s$", output, re.MULTILINE)


def test_special_tokens_and_suffixes_are_taken(succeeds: Succeeds, text: Path, tmp_path: Path) -> None:
    succeeds(
        *("tokenizer", "train", text, "--vocab-size", 5000, "--out", tmp_path / "tok", "--suffix", ".py"),
        *("--special-token", "<|user|>", "--special-token", "<|end|>"),
    )
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.encode("<|endoftext|><|user|><|end|>") == [0, 1, 2]
    assert len(tokenizer.encode("ZZZZ")) == 4


def test_a_smaller_vocabulary_is_said(succeeds: Succeeds, text: Path, tmp_path: Path) -> None:
    output = succeeds("tokenizer", "train", text, "--vocab-size", 5000, "--out", tmp_path / "tok")
    assert "warning: the text is too small for 5000 ids" in output


def test_sentinels_count_in_the_vocabulary(succeeds: Succeeds, text: Path, tmp_path: Path) -> None:
    roles = ("--roles", "encoder-decoder", "--sentinels", 6)
    succeeds("tokenizer", "train", text, "--vocab-size", 275, "--out", tmp_path / "tok", *roles)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert (tokenizer.vocab_size, tokenizer.vocabulary["<extra_id_0>"]) == (275, 274)


def test_characters(succeeds: Succeeds, text: Path, tmp_path: Path) -> None:
    succeeds("tokenizer", "train", text / "a.py", "--kind", "char", "--out", tmp_path / "tok")
    assert Tokenizer.load(tmp_path / "tok").vocab_size == 2 + len(set("def f(x):\n    return x + 1\n"))


def test_bad_usage_is_refused_and_writes_nothing(trine: Trine, succeeds: Succeeds, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    for arguments, expected, message in (
        ((text,), 2, "--vocab-size is needed"),
        ((text, "--kind", "char", "--vocab-size", 300), 2, "have no effect with --kind char"),
        (
            (text, "--kind", "wordpiece", "--vocab-size", 90, "--roles", "encoder"),
            2,
            "does not go with --kind wordpiece",
        ),
        ((text, "--vocab-size", 300, "--sentinels", 4), 2, "--sentinels 4 has no effect without"),
        ((text, "--vocab-size", 100), 2, "vocabulary size 100 is too small"),
        ((tmp_path / "nowhere", "--vocab-size", 300), 1, "no file or folder"),
    ):
        status, _, err = trine("tokenizer", "train", *arguments, "--out", out)
        assert status == expected
        assert message in err
        assert err.count("\n") == 1
    (text / "bad.txt").write_bytes(b"\n\xff")
    status, _, err = trine("tokenizer", "train", text, "--vocab-size", 300, "--out", out)
    assert status == 1
    assert "bad.txt:2: byte 0xff" in err
    assert not out.exists()
    assert "left out" in succeeds("tokenizer", "train", text, "--vocab-size", 300, "--out", out, "--skip-bad")


def test_an_existing_tokenizer_is_replaced_only_when_asked(
    trine: Trine, succeeds: Succeeds, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tok"
    succeeds("tokenizer", "train", text, "--vocab-size", 270, "--out", out)
    status, _, err = trine("tokenizer", "train", text, "--vocab-size", 280, "--out", out)
    assert status == 2
    assert "exists already; use --overwrite or another --out" in err
    assert Tokenizer.load(out).vocab_size == 270
    succeeds("tokenizer", "train", text, "--vocab-size", 275, "--out", out, "--overwrite")
    assert Tokenizer.load(out).vocab_size == 275


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_other_kinds_are_learned_and_prepare_text(succeeds: Succeeds, text: Path, tmp_path: Path, kind: str) -> None:
    arguments = ("--kind", kind, "--vocab-size", 350, "--special-token", "<|user|>", "--out", tmp_path / "tok")
    assert f"wrote {tmp_path / 'tok'}" in succeeds("tokenizer", "train", text, *arguments)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert len(tokenizer.encode("<|user|>")) <= 2  # itself, after the space that unigram puts in front
    succeeds("data", "prepare", text, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "data")
