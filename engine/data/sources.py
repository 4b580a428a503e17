"""From files to documents: text files, JSON lines, Parquet.

`read_source` turns a file into documents, in pieces of bounded size, so that memory stays constant whatever the size
of a file. A text file is one document; each line of a `.jsonl` file and each row of a `.parquet` file is one.

Everything that is not right (bytes that are not UTF-8, an empty file, a broken line) is a `BadInput` with file and
line or row; the caller decides whether it stops the run or is skipped and counted.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from trine.engine.data import parquet
from trine.engine.data.files import DamagedError, Reader, Source, json_fault, numbered_lines
from trine.engine.data.progress import ByteProgress
from trine.engine.data.shards import Split
from trine.engine.errors import DataError
from trine.engine.log import say, warn

# Text is encoded in pieces of at most about this many bytes: the library holds some 200 bytes for each of their tokens.
PIECE_BYTES = 1 << 16
JSON_LINES = (".jsonl", ".ndjson")
_SHOWN = 10
_LISTED = 1000


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document's text. `document` identifies the document; `ends` says it is the last stretch."""

    text: str
    document: str
    ends: bool
    position: int  # bytes read so far, for progress
    split: Split = "train"

    def moved(self, *, split: Split, position: int) -> Piece:
        """The same text in another split, at another position."""
        return replace(self, split=split, position=position)


@dataclass(frozen=True, slots=True)
class BadInput:
    """Something wrong in a file; `line` (a row of Parquet) counts from 1, 0 where the whole file is meant."""

    location: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.location}:{self.line}: {self.reason}" if self.line else f"{self.location}: {self.reason}"


Report = Callable[[int, str], None]  # line or row, reason


def read_source(
    source: Source,
    *,
    text_field: str = "text",
    complain: Callable[[BadInput], None],
    piece_bytes: int = PIECE_BYTES,
    check_first: bool = True,
) -> Iterator[Piece]:
    """The documents of a file, in pieces. Calls `complain` for what is wrong and goes on without it.

    A text file is read twice, so that a bad one is left out whole; `check_first=False` saves the first reading for
    those whose `complain` raises. Raises `DataError` where a server or a missing package is in the way.
    """

    def report(line: int, reason: str) -> None:
        complain(BadInput(source.location, line, reason))

    if source.suffix == parquet.SUFFIX:
        documents = parquet.read_rows(source, text_field, report)
    elif source.suffix in JSON_LINES:
        documents = _read_json_lines(source, text_field, report)
    else:
        yield from _read_text(source, report, piece_bytes, check_first)
        return
    for number, text, position in documents:
        *complete, last = cut(text, piece_bytes)
        for part in complete:
            yield Piece(part, f"{source.name}:{number}", False, position)
        yield Piece(last, f"{source.name}:{number}", True, position)


class Complaints:
    """Bad input as it is met: stops at the first, or (`skip_bad`) says the first few, counts and lists them."""

    def __init__(self, *, skip_bad: bool) -> None:
        self._skip_bad = skip_bad
        self.count = 0
        self.listed: list[str] = []

    def __call__(self, problem: BadInput) -> None:
        """Take note of `problem`. Raises `DataError` unless bad input is to be skipped."""
        if not self._skip_bad:
            raise DataError(f"{problem}; mend it, or leave such input out with --skip-bad")
        self.count += 1
        if self.count <= _SHOWN:
            warn(f"left out {problem}")
        if self.count == _SHOWN:
            say("further bad input is counted in silence")
        if self.count <= _LISTED:
            self.listed.append(str(problem))


def read_texts(sources: Sequence[Source], *, text_field: str = "text", skip_bad: bool = False) -> Iterator[str]:
    """The text of all sources in pieces of bounded size, document borders forgotten; progress is shown.

    Raises `DataError` for bad input unless `skip_bad`.
    """
    complaints = Complaints(skip_bad=skip_bad)
    before = 0
    with ByteProgress(sum(source.size for source in sources), what="reading") as progress:
        for source in sources:
            for piece in read_source(source, text_field=text_field, complain=complaints, check_first=skip_bad):
                progress.update(before + piece.position)
                yield piece.text
            before += source.size


def cut(text: str, limit: int) -> Iterator[str]:
    """`text` in stretches of at most `limit` characters, so that their tokens together are those of the whole.

    Cut between words where the last half has such a place, or else behind a line end, or anywhere.
    """
    start = 0
    while len(text) - start > limit:
        end = _cut_place(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut_place(text: str, first: int, last: int) -> int:
    for place in range(last - 1, first, -1):
        if _between_words(text[place - 1], text[place]):
            return place
    return text.rfind("\n", first, last) + 1 or last


def _between_words(before: str, after: str) -> bool:
    """Whether all usual ways of splitting text before merging split here: white space never goes with a word before.

    Line ends may go with punctuation before them, and spaces with spaces and line ends.
    """
    return after.isspace() and (before.isalnum() or not (before.isspace() or after in "\r\n"))


def _read_text(source: Source, report: Report, piece_bytes: int, check_first: bool) -> Iterator[Piece]:
    try:
        if check_first:
            for _ in _decoded(source, piece_bytes):
                pass
        pending, position = "", 0
        for text, position in _decoded(source, piece_bytes):
            *complete, pending = cut(pending + text, piece_bytes)
            for part in complete:
                yield Piece(part, source.name, False, position)
        yield Piece(pending, source.name, True, position)
    except _UnreadableError as error:
        report(error.line, error.reason)


def _decoded(source: Source, piece_bytes: int) -> Iterator[tuple[str, int]]:
    """The text of a file, block by block, with the position after each. Raises `_UnreadableError`."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte-order mark is no part of the text
    line, empty, ended = 1, True, False
    with Reader(source) as reader:
        while not ended:
            try:
                block = reader.file.read(piece_bytes)
                ended = not block
                yield decoder.decode(block, final=ended), reader.position
            except DamagedError as error:
                raise _UnreadableError(line, str(error)) from None
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise _UnreadableError(line, _not_utf8(error)) from None
            line += block.count(b"\n")
            empty = empty and ended
    if empty:
        raise _UnreadableError(0, "the file is empty")


def _read_json_lines(source: Source, text_field: str, report: Report) -> Iterator[tuple[int, str, int]]:
    number = 0
    with Reader(source) as reader:
        try:
            for number, line in numbered_lines(reader.file):
                text = _text_of_line(line, text_field)
                if isinstance(text, _Reason):
                    report(number, text)
                else:
                    yield number, text, reader.position
        except DamagedError as error:
            report(number + 1, str(error))
            return
    if number == 0:
        report(0, "the file is empty")


class _UnreadableError(Exception):
    """A text file that is left out; `line` counts from 1, 0 is the whole file."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


class _Reason(str):
    """Why a line has no text; a type of its own, so that it cannot be taken for the text."""

    __slots__ = ()


def _text_of_line(line: bytes, text_field: str) -> str | _Reason:
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _Reason(_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return _Reason(json_fault(line, error))
    if not isinstance(record, dict):
        return _Reason(f"a JSON object is expected, not {type(record).__name__}")
    if text_field not in record:
        return _Reason(f"no field {text_field!r}; the line has {', '.join(map(repr, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        return _Reason(f"field {text_field!r} should be a string, not {type(text).__name__}")
    if not text:
        return _Reason(f"field {text_field!r} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _Reason(f"field {text_field!r} holds half a surrogate pair, which no UTF-8 text can")
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    # Not the position: with a streaming decoder it counts from the block's start.
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not valid UTF-8 ({error.reason})"
