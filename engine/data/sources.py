"""Where text comes from: text files, folders of them, and JSON lines.

`find_sources` turns what a person names into an ordered list of files, each with a name that does not depend on where
the files lie. `read_source` turns a file into documents, in pieces of bounded size, so that memory stays constant
whatever the size of a file. A text file is one document; each line of a `.jsonl` file is one.

Everything that is not right (bytes that are not UTF-8, an empty file, a broken line) is a `BadInput` with file and
line; the caller decides whether it stops the run or is skipped and counted.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trine.engine.data.progress import ByteProgress
from trine.engine.data.shards import Split
from trine.engine.errors import DataError, UsageError
from trine.engine.log import say, warn

# Text is encoded in pieces of at most about this many bytes: large enough for speed, small enough for memory.
PIECE_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".ndjson")
_SHOWN = 10
_LISTED = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read. `name` is its path below the folder that was named (its own name if it was named itself)."""

    path: Path
    name: str
    size: int
    modified_ns: int


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
    """Something wrong in a file; `line` counts from 1, 0 where the whole file is meant."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


def find_sources(paths: Sequence[Path | str], *, suffixes: Sequence[str] = ()) -> list[Source]:
    """Files in the order given; folders are walked in sorted order, hidden entries left out.

    With `suffixes`, only files of a folder that end in one of them are taken. Raises `DataError` for a missing path
    or a folder without files, `UsageError` for a file named twice.
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [_source(file, file.relative_to(path).as_posix()) for file in _walk(path, tuple(suffixes))]
            if not found:
                wanted = f" that end in {' or '.join(suffixes)}" if suffixes else ""
                raise DataError(f"the folder {path} holds no files{wanted}; name a folder with text in it")
            sources.extend(found)
        elif path.is_file():
            sources.append(_source(path, path.name))
        else:
            raise DataError(f"no file or folder {path}; check the name")
    seen: set[Path] = set()
    for source in sources:
        resolved = source.path.resolve()
        if resolved in seen:
            raise UsageError(f"{source.path} is named more than once; name each file once")
        seen.add(resolved)
    return sources


def read_source(
    source: Source, *, text_field: str = "text", complain: Callable[[BadInput], None], piece_bytes: int = PIECE_BYTES
) -> Iterator[Piece]:
    """The documents of a file, in pieces. Calls `complain` for what is wrong and goes on without it."""
    if source.path.suffix.lower() in JSON_LINES:
        yield from _read_json_lines(source, text_field, complain, piece_bytes)
    else:
        yield from _read_text(source, complain, piece_bytes)


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
            for piece in read_source(source, text_field=text_field, complain=complaints):
                progress.update(before + piece.position)
                yield piece.text
            before += source.size


def cut(text: str, limit: int) -> Iterator[str]:
    """`text` in stretches of at most `limit` characters, cut behind a line end where there is one in the last half."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start + limit // 2, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _read_text(source: Source, complain: Callable[[BadInput], None], piece_bytes: int) -> Iterator[Piece]:
    problem = _check_text(source.path, piece_bytes)
    if problem is not None:
        complain(problem)
        return
    # Checked to the end before the first piece is given out: a bad file is left out whole, not in part.
    decoder = codecs.getincrementaldecoder("utf-8")()
    with source.path.open("rb") as file:
        pending = ""
        position = 0
        while block := file.read(piece_bytes):
            position += len(block)
            pending += decoder.decode(block)
            *complete, pending = cut(pending, piece_bytes)
            for text in complete:
                yield Piece(text, source.name, False, position)
        yield Piece(pending + decoder.decode(b"", final=True), source.name, True, position)


def _check_text(path: Path, piece_bytes: int) -> BadInput | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        empty = True
        while block := file.read(piece_bytes):
            empty = False
            held = decoder.getstate()[0]
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line += (held + block).count(b"\n", 0, error.start)
                return BadInput(path, line, _not_utf8(error))
            line += block.count(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return BadInput(path, line, _not_utf8(error))
    return BadInput(path, 0, "the file is empty") if empty else None


def _read_json_lines(
    source: Source, text_field: str, complain: Callable[[BadInput], None], piece_bytes: int
) -> Iterator[Piece]:
    position = 0
    with source.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            position += len(line)
            text = _text_of_line(line, text_field)
            if isinstance(text, _Reason):
                complain(BadInput(source.path, number, text))
                continue
            *complete, last = cut(text, piece_bytes)
            for part in complete:
                yield Piece(part, f"{source.name}:{number}", False, position)
            yield Piece(last, f"{source.name}:{number}", True, position)
    if position == 0:
        complain(BadInput(source.path, 0, "the file is empty"))


class _Reason(str):
    """Why a line has no text; a type of its own, so that it cannot be taken for the text."""

    __slots__ = ()


def _text_of_line(line: bytes, text_field: str) -> str | _Reason:
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _Reason(_not_utf8(error))
    except json.JSONDecodeError as error:
        return _Reason(f"not valid JSON ({error.msg}, column {error.colno})" if line.strip() else "the line is empty")
    except ValueError as error:  # a number of thousands of digits
        return _Reason(f"not readable as JSON ({error})")
    except RecursionError:
        return _Reason("JSON nested too deep")
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


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                yield Path(parent) / name


def _source(path: Path, name: str) -> Source:
    status = path.stat()
    return Source(path=path, name=name, size=status.st_size, modified_ns=status.st_mtime_ns)
