"""`trine tokenizer train`: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from trine.cli.main import app
from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer


def invoke(*arguments: object) -> str:
    """Run `trine ...`; returns what it printed, or raises what it raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("def f(x):\n    return x + 1\n" * 20)
    (tmp_path / "text" / "b.md").write_text("Z" * 50)
    return tmp_path / "text"


def test_train_writes_a_tokenizer(text: Path, tmp_path: Path) -> None:
    output = invoke("tokenizer", "train", text, "--vocab-size", 270, "--out", tmp_path / "tok")
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.vocab_size == 270
    assert f"270 ids, fingerprint {tokenizer.fingerprint[:12]}" in output


def test_special_tokens_and_suffixes_are_taken(text: Path, tmp_path: Path) -> None:
    invoke(
        *("tokenizer", "train", text, "--vocab-size", 5000, "--out", tmp_path / "tok", "--suffix", ".py"),
        *("--special-token", "<|user|>", "--special-token", "<|end|>"),
    )
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert tokenizer.encode("<|endoftext|><|user|><|end|>") == [0, 1, 2]
    assert len(tokenizer.encode("ZZZZ")) == 4


def test_a_smaller_vocabulary_is_said(text: Path, tmp_path: Path) -> None:
    output = invoke("tokenizer", "train", text, "--vocab-size", 5000, "--out", tmp_path / "tok")
    assert "warning: the text is too small for 5000 ids" in output


def test_characters(text: Path, tmp_path: Path) -> None:
    invoke("tokenizer", "train", text / "a.py", "--kind", "char", "--out", tmp_path / "tok")
    assert Tokenizer.load(tmp_path / "tok").vocab_size == 2 + len(set("def f(x):\n    return x + 1\n"))


def test_bad_usage_is_refused_and_writes_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    for arguments, error, message in (
        ((text,), UsageError, "--vocab-size is needed"),
        ((text, "--kind", "char", "--vocab-size", 300), UsageError, "have no effect with --kind char"),
        ((text, "--vocab-size", 100), UsageError, "vocabulary size 100 is too small"),
        ((tmp_path / "nowhere", "--vocab-size", 300), DataError, "no file or folder"),
    ):
        with pytest.raises(error, match=message):
            invoke("tokenizer", "train", *arguments, "--out", out)
    (text / "bad.txt").write_bytes(b"\n\xff")
    with pytest.raises(DataError, match=r"bad\.txt:2: byte 0xff"):
        invoke("tokenizer", "train", text, "--vocab-size", 300, "--out", out)
    assert not out.exists()
    assert "left out" in invoke("tokenizer", "train", text, "--vocab-size", 300, "--out", out, "--skip-bad")


def test_an_existing_tokenizer_is_replaced_only_when_asked(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    invoke("tokenizer", "train", text, "--vocab-size", 270, "--out", out)
    with pytest.raises(UsageError, match="exists already; use --overwrite or another --out"):
        invoke("tokenizer", "train", text, "--vocab-size", 280, "--out", out)
    assert Tokenizer.load(out).vocab_size == 270
    invoke("tokenizer", "train", text, "--vocab-size", 275, "--out", out, "--overwrite")
    assert Tokenizer.load(out).vocab_size == 275
