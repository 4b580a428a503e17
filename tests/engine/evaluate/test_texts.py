"""Texts to evaluate on: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trine.engine.errors import DataError
from trine.engine.evaluate.texts import read_texts


def test_files_folders_and_json_lines_become_texts(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("b" * 3_000_000)
    (tmp_path / "folder" / "a.txt").write_text("ä\r\n")
    (tmp_path / "lines.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    texts = read_texts([tmp_path / "lines.jsonl", tmp_path / "folder"], text_field="body")
    assert texts == ["one", "two", "ä\r\n", "b" * 3_000_000]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.txt", b"fine\n\xff\n", "bad.txt:2"),
        ("empty.txt", b"", "empty"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2"),
        ("field.jsonl", b'{"body": "a"}\n', "'text'"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_texts([path])
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        read_texts([tmp_path / "nowhere.txt"])
