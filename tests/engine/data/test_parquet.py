"""Parquet files: rows in order, one column, bad rows named, memory independent of the size of the file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from trine.engine.data.files import find_sources
from trine.engine.data.sources import BadInput, Piece, read_source
from trine.engine.errors import DataError

Write = Callable[..., Path]


def read(path: Path, **options: Any) -> tuple[list[Piece], list[str]]:
    problems: list[BadInput] = []
    (source,) = find_sources([path])
    pieces = list(read_source(source, complain=problems.append, **options))
    return pieces, [str(problem).replace(str(path), path.name) for problem in problems]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_each_row_is_a_document(tmp_path: Path, write_parquet: Write, kind: str, compression: str) -> None:
    texts = [f"naïve 値 😀 {number % 40}\n" for number in range(1000)]
    strings = pyarrow.array(texts)
    column = strings.dictionary_encode() if kind == "dictionary" else strings.cast(getattr(pyarrow, kind)())
    path = write_parquet(tmp_path / "a.parquet", compression=compression, text=column, id=list(range(1000)))
    pieces, problems = read(path)
    assert [(piece.text, piece.document, piece.ends) for piece in pieces] == [
        (text, f"a.parquet:{row}", True) for row, text in enumerate(texts, start=1)
    ]
    assert pieces[-1].position == path.stat().st_size
    assert problems == []


def test_the_column_is_chosen_and_long_rows_come_in_pieces(tmp_path: Path, write_parquet: Write) -> None:
    path = write_parquet(tmp_path / "A.PARQUET", body=["word " * 100, "b"], text=["t", "u"])
    pieces, _ = read(path, text_field="body", piece_bytes=64)
    assert "".join(piece.text for piece in pieces) == "word " * 100 + "b"
    assert [piece.ends for piece in pieces].count(True) == 2
    assert max(len(piece.text) for piece in pieces) <= 64


def test_bad_rows_are_named_and_left_out(tmp_path: Path, write_parquet: Write) -> None:
    invalid = pyarrow.array([b"good", b"b\xffd", b"fine"], pyarrow.binary()).view(pyarrow.string())
    pieces, problems = read(write_parquet(tmp_path / "a.parquet", text=invalid))
    assert [piece.text for piece in pieces] == ["good", "fine"]
    assert problems == ["a.parquet:2: column 'text': byte 0xff is not valid UTF-8 (invalid start byte)"]
    pieces, problems = read(write_parquet(tmp_path / "b.parquet", text=["", None, "good"]))
    assert [piece.document for piece in pieces] == ["b.parquet:3"]
    assert problems == ["b.parquet:1: column 'text' is empty", "b.parquet:2: column 'text' is null"]


def test_wrong_files_are_named_whole(tmp_path: Path, write_parquet: Write) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    assert read(path)[1] == ["a.parquet: no column 'text'; the file has 'body', 'id' (--text-column)"]
    assert read(path, text_field="id")[1] == ["a.parquet: column 'id' should hold strings, not int64"]
    assert read(write_parquet(tmp_path / "b.parquet", text=pyarrow.array([], pyarrow.string())))[1] == [
        "b.parquet: the file has no rows"
    ]
    for content in (b"", b"PAR1 and nothing else", path.read_bytes()[:-20]):
        (tmp_path / "c.parquet").write_bytes(content)
        ((problem,),) = (read(tmp_path / "c.parquet")[1],)
        assert problem.startswith("c.parquet: not readable as Parquet (")
        assert "\n" not in problem
    (tmp_path / "d.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"d\.parquet\.gz: Parquet is read in places and cannot be compressed whole"):
        read(tmp_path / "d.parquet.gz")


def test_without_pyarrow_one_line_says_what_to_install(
    tmp_path: Path, write_parquet: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: reading Parquet needs pyarrow; install it: pip"):
        read(path)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt\.zst: \.zst needs pyarrow; install it: pip install 'trine\[data\]'"):
        read(tmp_path / "a.txt.zst")


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = 40_000
    table = pyarrow.table({"text": [f"{number:>2000}" for number in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows, compression="none", use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    del table
    pool = pyarrow.default_memory_pool()
    (source,) = find_sources([path])
    before = pool.bytes_allocated()
    most = 0
    for count, _ in enumerate(read_source(source, complain=lambda problem: pytest.fail(str(problem))), start=1):  # noqa: B007
        most = max(most, pool.bytes_allocated() - before)
    assert count == rows
    assert most < path.stat().st_size / 10
