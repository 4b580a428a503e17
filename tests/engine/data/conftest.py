"""Prepared folders, small enough to check token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.data.prepare import prepare
from trine.engine.text.tokenizer import Tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "def",
    "add",
    "first",
    "second",
    "return",
    "value",
    "naïve",
    "値",
    "😀",
]


def document(number: int) -> str:
    """A text of its own length and content for each number."""
    length = 1 + (number * 7919) % 23
    return " ".join(WORDS[(number * 31 + i * i) % len(WORDS)] for i in range(length)) + f" {number}\n"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def make_prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Callable[..., Path]:
    """`make_prepared(first, count, ...)` prepares documents number first, first + 1, ... as JSON lines."""

    def make(first: int, count: int, *, validation_fraction: float = 0.0, shard_tokens: int = 1 << 27) -> Path:
        folder = tmp_path_factory.mktemp("prepared")
        lines = [json.dumps({"text": document(number)}) for number in range(first, first + count)]
        (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
        prepare(
            [folder / "documents.jsonl"],
            tokenizer_dir=tokenizer_dir,
            out=folder / "out",
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
        )
        return folder / "out"

    return make


@pytest.fixture(scope="session")
def prepared(make_prepared: Callable[..., Path]) -> Path:
    """Documents 0 to 119 with some held out, in shards of 500 tokens."""
    return make_prepared(0, 120, validation_fraction=0.2, shard_tokens=500)


@pytest.fixture(scope="session")
def write_parquet() -> Callable[..., Path]:
    """`write_parquet(path, compression=..., column=values, ...)` writes a Parquet file of several row groups."""
    import pyarrow
    import pyarrow.parquet

    def write(path: Path, *, compression: str = "snappy", **columns: Any) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), path, compression=compression, row_group_size=300)
        return path

    return write


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents 0 to 199 prepared with a WordPiece tokenizer of 120 ids, some held out."""
    from trine.engine.text.train_tokenizer import train_wordpiece

    folder = tmp_path_factory.mktemp("wordpiece")
    texts = [document(number) for number in range(200)]
    train_wordpiece(texts, vocab_size=120).save(folder / "tokenizer")
    (folder / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare(
        [folder / "documents.jsonl"], tokenizer_dir=folder / "tokenizer", out=folder / "out", validation_fraction=0.2
    )
    return folder / "out"
