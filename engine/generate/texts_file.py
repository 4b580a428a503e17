"""A file of texts, pairs of texts or lists of words, row by row: lines of text, JSON lines, Parquet; also compressed,
and URLs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trine.engine.data.files import DamagedError, Reader, Source, find_sources, json_fault, numbered_lines
from trine.engine.data.sources import JSON_LINES
from trine.engine.errors import DataError, UsageError

PARQUET = ".parquet"
# A text, a pair, or words.
Row = str | tuple[str, str] | list[str]


@dataclass(frozen=True, slots=True)
class TextsFile:
    """`fields`: of a JSON line or columns of Parquet: one for texts, two for pairs. Lines of text need none.

    `words`: a field may hold a list of words too.
    """

    source: Source
    fields: Sequence[str]
    words: bool = False

    @classmethod
    def find(cls, name: str, fields: Sequence[str] | None, *, words: bool = False) -> TextsFile:
        """The file of that name.

        Raises `DataError` where there is none, `UsageError` for a folder, and for fields of a file of plain lines.
        """
        sources = find_sources([name])
        if len(sources) != 1 or sources[0].name != name.rstrip("/").rpartition("/")[2]:
            raise UsageError(f"{name} is a folder; name one file")
        source = sources[0]
        plain = source.suffix not in (*JSON_LINES, PARQUET)
        if plain and fields:
            raise UsageError(
                f"{name} holds lines of text, which have no field {fields[0]!r}; give a .jsonl or .parquet file, or "
                "leave out the field"
            )
        return cls(source, tuple(fields or ("text",)), words)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the file's content, or of what a server says of it."""
        if self.source.remote:
            return {"location": self.source.location, "size": self.source.size, "version": self.source.version}
        with Path(self.source.location).open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The texts from row `start` on. Raises `DataError` naming the row that is wrong, or a file without rows."""
        rows = self._parquet() if self.source.suffix == PARQUET else self._lines()
        try:
            yield from islice(rows, start, None)
        except DamagedError as error:
            raise DataError(f"{self.source.location}: {error}") from None

    def _lines(self) -> Iterator[Row]:
        is_json = self.source.suffix in JSON_LINES
        with Reader(self.source) as reader:
            for number, line in numbered_lines(reader.file):
                where = f"{self.source.location}:{number}"
                try:
                    text = line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not valid UTF-8 ({error.reason}); convert the file") from None
                yield self._record(text, where) if is_json else text

    def _record(self, text: str, where: str) -> Row:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {json_fault(text, error)}; give one object a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a {type(record).__name__}; give an object with {self._names}")
        return _row([self._field(record, name, where) for name in self.fields])

    def _parquet(self) -> Iterator[Row]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{self.source.location}: reading Parquet needs pyarrow; install it: pip install 'trine[data]'"
            ) from None
        with Reader(self.source) as reader:
            number = 0
            try:
                file = pyarrow.parquet.ParquetFile(reader.file, pre_buffer=False)
                lacking = [name for name in self.fields if name not in file.schema_arrow.names]
                if lacking:
                    known = ", ".join(file.schema_arrow.names)
                    raise DataError(f"{self.source.location} has no column {lacking[0]!r}; it has {known} (--field)")
                for batch in file.iter_batches(batch_size=256, columns=list(self.fields)):
                    for record in batch.to_pylist():
                        number += 1
                        where = f"{self.source.location}, row {number}"
                        yield _row([self._field(record, name, where) for name in self.fields])
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{self.source.location}: not readable as Parquet ({error})") from None

    @property
    def _names(self) -> str:
        return " and ".join(map(repr, self.fields))

    def _field(self, record: dict[str, Any], name: str, where: str) -> str | list[str]:
        if name not in record:
            raise DataError(f"{where}: no field {name!r}; it has {', '.join(map(repr, record)) or 'none'} (--field)")
        value: Any = record[name]
        is_words = self.words and isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not isinstance(value, str) and not is_words:
            wanted = "a text or a list of words" if self.words else "a text"
            raise DataError(f"{where}: field {name!r} is {type(value).__name__}; it must hold {wanted}")
        try:
            (value if isinstance(value, str) else " ".join(value)).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}: field {name!r} holds half a surrogate pair, which no text can") from None
        found: str | list[str] = value
        return found


def _row(found: list[str | list[str]]) -> Row:
    if len(found) == 1:
        return found[0]
    one, two = found
    assert isinstance(one, str)
    assert isinstance(two, str)
    return one, two
