"""Compressed files: the same bytes as unpacked, and damage named."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from trine.engine.data.files import Reader, find_sources, is_url
from trine.engine.data.prepare import prepare
from trine.engine.data.shards import TokenShards
from trine.engine.data.sources import BadInput, Piece, read_source


def _zstandard(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstandard,
}


def read(path: Path, *, piece_bytes: int = 1 << 20) -> tuple[list[Piece], list[str]]:
    problems: list[BadInput] = []
    (source,) = find_sources([path])
    pieces = list(read_source(source, complain=problems.append, piece_bytes=piece_bytes))
    return pieces, [str(problem).replace(str(path), path.name) for problem in problems]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("piece_bytes", [7, 1000, 1 << 20])
def test_pieces_are_those_of_the_unpacked_file(tmp_path: Path, suffix: str, piece_bytes: int) -> None:
    content = ("naïve 値 😀 line\n" * 100 + "x" * 3000).encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](content))
    plain, _ = read(tmp_path / "a.txt", piece_bytes=piece_bytes)
    packed, problems = read(tmp_path / f"a.txt{suffix}", piece_bytes=piece_bytes)
    assert [(piece.text, piece.ends) for piece in packed] == [(piece.text, piece.ends) for piece in plain]
    assert packed[-1].position == (tmp_path / f"a.txt{suffix}").stat().st_size
    assert problems == []


@pytest.mark.parametrize("suffix", PACKERS)
def test_parts_packed_one_after_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](b"one ") + PACKERS[suffix](b"two"))
    assert [piece.text for piece in read(tmp_path / f"a.txt{suffix}")[0]] == ["one two"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_are_recognized_inside(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"A.JSONL{suffix.upper()}").write_bytes(PACKERS[suffix](b'{"text": "one"}\n{"text": "two"}\n'))
    assert [piece.text for piece in read(tmp_path / f"A.JSONL{suffix.upper()}")[0]] == ["one", "two"]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["cut off", "other bytes", "not packed", "empty inside"])
def test_damage_is_named_and_the_file_left_out(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](b"".join(b"line %d\n" % number for number in range(40_000)))
    content = {
        "cut off": packed[:-9],
        "other bytes": packed[:40] + b"\x00\xff" * 20 + packed[80:],
        "not packed": b"plain text with a wrong name\n" * 9,
        "empty inside": PACKERS[suffix](b""),
    }[damage]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    pieces, (problem,) = read(path)
    assert pieces == []
    expected = "the file is empty" if damage == "empty inside" else f"the {suffix} data is damaged or cut off ("
    assert expected in problem
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(PACKERS[suffix](b'{"text": "whole"}\n' * 40_000)[:-9])
    pieces, (problem,) = read(lines)
    assert {piece.text for piece in pieces} <= {"whole"}
    assert "is damaged or cut off" in problem


def test_packed_and_plain_files_prepare_to_the_same_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    content = b"the cat sat on a mat\n" * 500
    fingerprints = set()
    for suffix in ("", *PACKERS):
        (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](content) if suffix else content)
        prepare([tmp_path / f"a.txt{suffix}"], tokenizer_dir=tokenizer_dir, out=tmp_path / f"out{suffix}")
        fingerprints.add(TokenShards.open(tmp_path / f"out{suffix}").fingerprint)
    assert len(fingerprints) == 1


def test_a_small_file_that_unpacks_to_a_large_one_is_read_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    for suffix in (".gz", ".xz"):
        (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](b"\n" * (32 << 20)))
        (source,) = find_sources([tmp_path / f"a.txt{suffix}"])
        tracemalloc.start()
        with Reader(source) as reader:
            while reader.file.read(1 << 20):
                pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 16 << 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://a/b", True),
        ("https://a", True),
        ("abfs+x://a", True),
        ("a/b", False),
        ("://a", False),
        ("a b://c", False),
    ],
)
def test_urls_are_told_from_paths(name: str, expected: bool) -> None:
    assert is_url(name) is expected
