"""Finding and reading text: order, pieces, and bad input named by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from trine.engine.data import progress, sources
from trine.engine.data.files import find_sources
from trine.engine.data.sources import BadInput, Piece, cut, read_source, read_texts
from trine.engine.errors import DataError, UsageError
from trine.engine.text.train_tokenizer import PRETOKENS


def read(path: Path, *, piece_bytes: int = 1 << 20, text_field: str = "text") -> tuple[list[Piece], list[str]]:
    problems: list[BadInput] = []
    (source,) = find_sources([path])
    pieces = read_source(source, complain=problems.append, piece_bytes=piece_bytes, text_field=text_field)
    return list(pieces), [str(problem).replace(str(path), path.name) for problem in problems]


def test_folders_are_walked_sorted_without_hidden_entries(tmp_path: Path) -> None:
    for name in ("b.py", "a.txt", "sub/c.py", ".hidden/d.py", ".e.py", "__pycache__/f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [source.name for source in find_sources([tmp_path])] == ["a.txt", "b.py", "sub/c.py"]
    assert [source.name for source in find_sources([tmp_path], suffixes=[".py"])] == ["b.py", "sub/c.py"]
    assert [source.name for source in find_sources([tmp_path / "b.py"])] == ["b.py"]


def test_missing_empty_and_repeated_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"no file or folder .*nowhere"):
        find_sources([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"holds no files that end in \.py"):
        find_sources([tmp_path], suffixes=[".py"])
    with pytest.raises(UsageError, match=r"a\.txt is named more than once"):
        find_sources([tmp_path, tmp_path / "a.txt"])


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 64, 1 << 20])
def test_pieces_join_to_the_text_whatever_their_size(tmp_path: Path, piece_bytes: int) -> None:
    text = "naïve 値\r\n😀😀 line\n\n" * 5 + "end"
    (tmp_path / "t.txt").write_bytes(text.encode())
    pieces, problems = read(tmp_path / "t.txt", piece_bytes=piece_bytes)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= max(2 * piece_bytes, 2)
    assert pieces[-1].position == len(text.encode())
    assert problems == []


def test_cut_prefers_the_ends_of_words() -> None:
    assert list(cut("ab\ncde f(\nghijklmnop", 10)) == ["ab\ncde", " f(\nghijkl", "mnop"]
    assert list(cut("abcdefg:  hijk", 12)) == ["abcdefg:", "  hijk"]
    assert list(cut("(ab):\n\n(cd)\nefghij", 12)) == ["(ab):\n\n(cd)\n", "efghij"]
    assert list(cut("", 8)) == [""]


# How texts are cut into words before merging: as this package's own, GPT-2's, and Llama 3's and Qwen's vocabularies do.
SPLITS = {
    "ours": PRETOKENS,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("name", SPLITS)
def test_words_of_the_pieces_are_those_of_the_text(name: str) -> None:
    split = Split(Regex(SPLITS[name]), "isolated")

    def words(text: str) -> list[str]:
        return [word for word, _ in split.pre_tokenize_str(text)]

    text = Path(sources.__file__).read_text(encoding="utf-8") + "値 Straße,\r\n\r\n\tnaïve  x\t2:\n\n    y = {}\n" * 40
    for limit in (500, 1001, 2000):
        pieces = list(cut(text, limit))
        assert max(map(len, pieces)) <= limit
        assert [word for piece in pieces for word in words(piece)] == words(text)


@pytest.mark.parametrize("piece_bytes", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "bad.txt: the file is empty"),
        (b"good\nline\nb\xffad", "bad.txt:3: byte 0xff is not valid UTF-8 (invalid start byte)"),
        (b"good\n\xf0\x9f\x98", "bad.txt:2: byte 0xf0 is not valid UTF-8 (unexpected end of data)"),
        (b"\xed\xa0\x80\n", "bad.txt:1: byte 0xed is not valid UTF-8 (invalid continuation byte)"),
    ],
)
def test_bad_text_is_left_out_whole_and_named_by_line(
    tmp_path: Path, content: bytes, problem: str, piece_bytes: int
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    assert read(tmp_path / "bad.txt", piece_bytes=piece_bytes) == ([], [problem])


def test_each_json_line_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n", "id": 1}\n{"id": 2, "text": "\\ud83d\\ude00"}')
    pieces, problems = read(tmp_path / "a.jsonl")
    assert [(piece.text, piece.document, piece.ends) for piece in pieces] == [
        ("one\n", "a.jsonl:1", True),
        ("😀", "a.jsonl:2", True),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not valid JSON (Expecting ',' delimiter, column 13)"),
        (b"", "the line is empty"),
        (b'"text"', "a JSON object is expected, not str"),
        (b'{"body": "x", "id": 1}', "no field 'text'; the line has 'body', 'id'"),
        (b"{}", "no field 'text'; the line has none"),
        (b'{"text": 3}', "field 'text' should be a string, not int"),
        (b'{"text": ""}', "field 'text' is empty"),
        (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair, which no UTF-8 text can"),
        (b'{"text": "\xff"}', "byte 0xff is not valid UTF-8 (invalid start byte)"),
        (b'{"text": ' + b"1" * 5000 + b"}", None),
        (b"[" * 100_000, "JSON nested too deep"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: bytes, reason: str | None) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    pieces, problems = read(tmp_path / "a.jsonl")
    assert [piece.text for piece in pieces] == ["good", "too"]
    if reason is None:  # the interpreter's own words
        assert problems[0].startswith("a.jsonl:2: not valid JSON (")
    else:
        assert problems == [f"a.jsonl:2: {reason}"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    for name, texts in (("a.jsonl", ["one", "two"]), ("b.txt", ["three"])):
        pieces, problems = read(tmp_path / name)
        assert ([piece.text for piece in pieces], problems) == (texts, [])


def test_line_of_bad_text_is_counted_behind_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\nb\n\xff\n\n\n")
    assert read(tmp_path / "a.txt")[1] == ["a.txt:3: byte 0xff is not valid UTF-8 (invalid start byte)"]


def test_text_field_chooses_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "b", "text": "t"}\n')
    assert [piece.text for piece in read(tmp_path / "a.jsonl", text_field="body")[0]] == ["b"]


def test_read_texts_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text("a" * 512)
    (tmp_path / "b.txt").write_text("b" * 1536)
    assert "".join(read_texts(find_sources([tmp_path]))) == "a" * 512 + "b" * 1536
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading: 25% (512 B of 2.0 KiB), ")
    assert lines[-1].startswith("reading: 100% (2.0 KiB of 2.0 KiB), ")


def test_read_texts_stops_at_bad_input_or_skips_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("good")
    for number in range(12):
        (tmp_path / f"empty{number:02d}.txt").touch()
    sources = find_sources([tmp_path])
    with pytest.raises(DataError, match=r"empty00\.txt: the file is empty; .*--skip-bad"):
        list(read_texts(sources))
    assert list(read_texts(sources, skip_bad=True)) == ["good"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "further bad input is counted in silence"
