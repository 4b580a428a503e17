"""Finding the files that text is read from, and opening them: local, remote, compressed.

`find_sources` turns what a person names into an ordered list of files, each with a name that does not depend on where
the files lie. `Reader` gives the bytes of one, decompressed on the way, so that a file never has to lie unpacked or
whole on this machine. URLs (`s3://`, `https://`, `hf://`, ...) are in `remote`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from trine.engine.errors import DataError, UsageError

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file to read.

    location: its path as it was named or found, or its URL.
    name: its path below the folder that was named (its own name if it was named itself).
    size: bytes as they are stored; 0 where a server does not say.
    modified_ns: time of its last change; 0 for a URL.
    version: for a URL, what its store gives to tell one content from another (an ETag, a time); "" where nothing.
    """

    location: str
    name: str
    size: int
    modified_ns: int = 0
    remote: bool = False
    version: str = ""

    @property
    def identity(self) -> str:
        """The same for two sources that are one file."""
        return self.location if self.remote else os.path.realpath(self.location)

    @property
    def suffix(self) -> str:
        """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`, in lower case."""
        name = Path(self.name.lower())
        return Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix

    @property
    def compression(self) -> str | None:
        """The suffix that says how the file is compressed; None where it is not."""
        suffix = Path(self.name.lower()).suffix
        return suffix if suffix in COMPRESSIONS else None


class DamagedError(Exception):
    """What is compressed cannot be decompressed: the reason, in words."""


def find_sources(paths: Sequence[Path | str], *, suffixes: Sequence[str] = ()) -> list[Source]:
    """Files in the order given; folders are walked in sorted order, hidden entries left out.

    A path may be a URL. With `suffixes`, only files of a folder that end in one of them are taken.
    Raises `DataError` for a missing path or a folder without files, `UsageError` for a file named twice.
    """
    sources: list[Source] = []
    for named in paths:
        found = _find(named, tuple(suffixes))
        if not found:
            wanted = f" that end in {' or '.join(suffixes)}" if suffixes else ""
            raise DataError(f"the folder {named} holds no files{wanted}; name a folder with text in it")
        sources.extend(found)
    seen: set[str] = set()
    for source in sources:
        if source.identity in seen:
            raise UsageError(f"{source.location} is named more than once; name each file once")
        seen.add(source.identity)
    return sources


class Reader:
    """An open source: `file` gives its bytes after decompression; `position` counts them as they are stored.

    Reading raises `DamagedError` where the compressed data is not right, `DataError` where a server fails.
    """

    def __init__(self, source: Source) -> None:
        self._stored = _open_stored(source)
        self.file = self._stored
        if source.compression is not None:
            try:
                packed = _Decompressing(COMPRESSIONS[source.compression](self._stored, source), source.compression)
            except BaseException:
                self._stored.close()
                raise
            self.file = cast(BinaryIO, io.BufferedReader(packed, _BUFFER_BYTES))

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self._stored.close()

    @property
    def position(self) -> int:
        """How many bytes of the file as it is stored have been read."""
        return self._stored.tell()


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1. A byte-order mark, which programs of Windows write, is no part of them."""
    for number, line in enumerate(file, start=1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def json_fault(line: str | bytes, error: Exception) -> str:
    """Why a line is no JSON: the place in it, and no number of a line, which would be another than the file's."""
    if not line.strip():
        return "the line is empty"
    if isinstance(error, RecursionError):
        return "JSON nested too deep"
    where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return f"not valid JSON ({where})"


class _Decompressing(io.RawIOBase):
    """Gives every kind of damage one type."""

    def __init__(self, file: BinaryIO, suffix: str) -> None:
        self._file = file
        self._suffix = suffix

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            block = self._file.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise DamagedError(f"the {self._suffix} data is damaged or cut off ({error})") from None
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_stored(source: Source) -> BinaryIO:
    if source.remote:
        from trine.engine.data.remote import open_remote

        return open_remote(source)
    return Path(source.location).open("rb")


def _gzip(file: BinaryIO, _: Source) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _bzip2(file: BinaryIO, _: Source) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(file))


def _xz(file: BinaryIO, _: Source) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(file))


def _zstandard(file: BinaryIO, source: Source) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{source.location}: .zst needs pyarrow; install it: pip install 'trine[data]'") from None
    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))


COMPRESSIONS: dict[str, Callable[[BinaryIO, Source], BinaryIO]] = {
    ".gz": _gzip,
    ".bz2": _bzip2,
    ".xz": _xz,
    ".zst": _zstandard,
}


def is_url(name: Path | str) -> bool:
    """Whether a name is a URL, such as `s3://bucket/file`."""
    scheme, separator, _ = str(name).partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").replace(".", "").replace("::", "").isalnum()


def _find(named: Path | str, suffixes: tuple[str, ...]) -> list[Source]:
    if is_url(named):
        from trine.engine.data.remote import find_remote

        return find_remote(str(named), suffixes)
    path = Path(named)
    if path.is_dir():
        return [_local(file, file.relative_to(path).as_posix()) for file in _walk(path, suffixes)]
    if path.is_file():
        return [_local(path, path.name)]
    raise DataError(f"no file or folder {path}; check the name")


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                yield Path(parent) / name


def _local(path: Path, name: str) -> Source:
    status = path.stat()
    return Source(location=str(path), name=name, size=status.st_size, modified_ns=status.st_mtime_ns)
