"""Labelled examples: JSON lines or rows of Parquet whose fields the recipe names, encoded once, held as flat arrays.

A `Task` (`pairs.py`, `texts.py`, `tagged.py`, `chats.py`, `preferences.py`) says which fields there are and what is
kept of a record; an `ExampleSet` is what it made of the files of one source. Memory is that of the numbers, 4 bytes for
each token. Everything that is not right is one `DataError` with file and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from trine.engine.data import parquet
from trine.engine.data.files import DamagedError, Reader, Source, find_sources, json_fault, numbered_lines
from trine.engine.data.progress import ByteProgress
from trine.engine.data.sources import JSON_LINES
from trine.engine.errors import DataError
from trine.engine.log import warn
from trine.engine.text.tokenizer import Tokenizer

Example = tuple[npt.NDArray[Any], ...]
_JOB_RECORDS = 1 << 10


@dataclass(frozen=True, slots=True)
class Record:
    """A line of a file: its fields, and where it stands, for complaints."""

    place: str
    fields: dict[str, Any]
    position: int  # bytes read so far

    def text(self, field: str, *, empty: bool = False) -> str:
        """A field that holds text. Raises `DataError` where it does not, or where it is empty and must not be."""
        value = self.field(field)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: field {field!r} should be text, not {kind_of(value)}")
        if not value and not empty:
            raise DataError(f"{self.place}: field {field!r} is empty; leave the line out")
        return _spelled(value, self.place, field)

    def words(self, field: str) -> list[str]:
        """A field that holds a list of words."""
        value = self.field(field)
        if not isinstance(value, list) or not value or any(not isinstance(word, str) or not word for word in value):
            raise DataError(f"{self.place}: field {field!r} should be a list of words, not {_shown(value)}")
        return [_spelled(word, self.place, field) for word in value]

    def field(self, field: str) -> Any:
        """A field, whatever it holds. Raises `DataError` where the line lacks it."""
        if field not in self.fields:
            raise DataError(
                f"{self.place}: no field {field!r}; the line has {', '.join(map(repr, self.fields)) or 'none'}: name "
                "the right one"
            )
        return self.fields[field]


class Task(Protocol):
    """What becomes of records and of examples; a batch is made of any of them in any order.

    `dtypes`: of the arrays of an example. `identity` says in words all that decides about them, the tokenizer apart.
    """

    @property
    def dtypes(self) -> tuple[str, ...]: ...

    @property
    def identity(self) -> str: ...

    def encode(self, records: Sequence[Record]) -> Sequence[Example | None]:
        """Each record as an example, None where cutting leaves nothing to learn from.

        Raises `DataError` naming the line that has none.
        """
        ...

    def tokens(self, example: Example) -> int:
        """How many tokens of an example go through a model."""
        ...

    def terms(self, example: Example) -> int:
        """How many terms of the loss an example has."""
        ...

    def shown(self, example: Example) -> str:
        """An example as text, for people to look at."""
        ...

    def make(self, examples: Sequence[Example]) -> Any:
        """A batch of these examples."""
        ...


def read_records(path: Path | str) -> Iterator[Record]:
    """The lines of a `.jsonl` file or rows of a `.parquet` file, of one behind a URL, or of all in a folder."""
    before = 0
    for source in find_sources([path]):
        if source.suffix == parquet.SUFFIX:
            found = parquet.read_tables(source, partial(_refuse, source))
        elif source.suffix in JSON_LINES:
            found = _lines(source)
        else:
            raise DataError(
                f"{source.location}: labelled examples are JSON lines or rows of Parquet, in files that end in .jsonl "
                "or .parquet"
            )
        for number, fields, position in found:
            yield Record(f"{source.location}:{number}", fields, before + position)
        before += source.size


def _refuse(source: Source, row: int, reason: str) -> NoReturn:
    raise DataError(f"{source.location}{f':{row}' if row else ''}: {reason}; mend it, or get the file again")


def _lines(source: Source) -> Iterator[tuple[int, dict[str, Any], int]]:
    number = 0
    with Reader(source) as reader:
        try:
            for number, line in numbered_lines(reader.file):
                yield number, _fields(line, f"{source.location}:{number}"), reader.position
        except DamagedError as error:
            raise DataError(f"{source.location}:{number + 1}: {error}; get the file again") from None
    if number == 0:
        raise DataError(f"{source.location}: the file is empty; give examples, one JSON object a line")


class ExampleSet:
    """The examples of one path, encoded. `len()` is their number; how many were left out because cutting left nothing
    to learn from is said.

    Attributes: path, fingerprint (of numbers, task and tokenizer, not of paths), num_tokens, num_terms (of the loss),
    stamps (size and time of change of each file before it was read). Raises `DataError` for what is not right, with
    file and line.
    """

    def __init__(self, path: Path | str, task: Task, tokenizer: Tokenizer) -> None:
        self.path = path
        self._task, self._tokenizer = task, tokenizer
        self._sources = find_sources([path])
        self.stamps = [[source.size, source.modified_ns] for source in self._sources]
        self._columns = [_Ragged(dtype) for dtype in task.dtypes]
        self.num_tokens = self.num_terms = 0
        self.fingerprint = self._read(self._columns)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, number: int) -> Example:
        return tuple(column[number] for column in self._columns)

    def _read(self, columns: Sequence[_Ragged]) -> str:
        total, left_out = sum(source.size for source in self._sources), 0
        with ByteProgress(total, what="reading examples") as progress:
            for records in _jobs(read_records(self.path)):
                tokens = 0
                for example in self._task.encode(records):
                    if example is None:
                        left_out += 1
                        continue
                    tokens += self._task.tokens(example)
                    self.num_terms += self._task.terms(example)
                    for column, values in zip(columns, example, strict=True):
                        column.append(values)
                self.num_tokens += tokens
                progress.update(records[-1].position, tokens=tokens)
        digest = hashlib.sha256(f"examples-1 {self._task.identity} {self._tokenizer.fingerprint}".encode())
        for column in columns:
            column.close()
            column.update(digest)
        if left_out:
            self._tell(left_out)
        return digest.hexdigest()

    def _tell(self, left_out: int) -> None:
        """Raises `DataError` where nothing is left at all."""
        of = f"{left_out} of {left_out + len(self)} examples"
        what = f"{self.path}: cut to data.seq_len, {of} have nothing to learn from"
        if not len(self):
            raise DataError(f"{what}; raise data.seq_len")
        warn(f"{what} and are left out")


class _Ragged:
    """Rows of different lengths in one flat array."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._parts: list[npt.NDArray[Any]] = []
        self._lengths: list[int] = []

    def append(self, values: npt.NDArray[Any]) -> None:
        self._parts.append(np.asarray(values, dtype=self._dtype))
        self._lengths.append(len(values))

    def close(self) -> None:
        self._values = np.concatenate(self._parts) if self._parts else np.empty(0, self._dtype)
        self._bounds = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        self._parts, self._lengths = [], []

    def update(self, digest: hashlib._Hash) -> None:
        digest.update(self._values.astype(self._dtype.newbyteorder("<")).data)
        digest.update(self._bounds.astype("<i8").data)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> npt.NDArray[Any]:
        return self._values[self._bounds[number] : self._bounds[number + 1]]


def _jobs(records: Iterable[Record]) -> Iterator[list[Record]]:
    job: list[Record] = []
    for record in records:
        job.append(record)
        if len(job) == _JOB_RECORDS:
            yield job
            job = []
    if job:
        yield job


def _fields(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {json_fault(line, error)}; mend it or take it out") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: a JSON object is expected, not {kind_of(record)}")
    return record


def _spelled(text: str, place: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: field {field!r} holds half a surrogate pair, which no UTF-8 text can") from None
    return text


def kind_of(value: Any) -> str:
    """What a value of JSON is, for messages."""
    return "null" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
