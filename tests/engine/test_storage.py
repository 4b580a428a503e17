"""A full disk is one line with the name of what was to be written, and leaves nothing half written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trine.engine.data.prepare import prepare
from trine.engine.errors import StorageError
from trine.engine.storage import writing
from trine.engine.text.tokenizer import Tokenizer


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can be longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_grow_is_named_and_removed(tmp_path: Path) -> None:
    page, aside = tmp_path / "page", tmp_path / "page.partial"
    told = r"cannot write .*page \(File too large\); make room there"
    with files_up_to(100), pytest.raises(StorageError, match=told), writing(page, aside):
        aside.write_text("x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), writing(tmp_path / "page"):
        (tmp_path / "missing").read_text()


def test_data_that_finds_no_room_leaves_nothing(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 500)
    with files_up_to(2000), pytest.raises(StorageError, match=r"cannot write .*prepared \(File too large\)"):
        prepare([tmp_path / "a.txt"], tokenizer_dir=tmp_path / "tokenizer", out=tmp_path / "prepared", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "tokenizer"]


def test_a_tokenizer_that_finds_no_room_leaves_no_part_of_a_file(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    with files_up_to(1000), pytest.raises(OSError, match="File too large"):
        tiny_tokenizer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
