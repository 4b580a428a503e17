"""Parquet files: each row is a document, its text in one column, or an example with all of its columns.

Only the columns that are wanted are read, page by page within each row group, so that memory does not grow with the
file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from trine.engine.data.files import Reader, Source
from trine.engine.errors import DataError

SUFFIX = ".parquet"
_BATCH_ROWS = 64
_PAGE_BUFFER_BYTES = 1 << 20
_COLUMNS_SHOWN = 12


def read_rows(source: Source, column: str, complain: Callable[[int, str], None]) -> Iterator[tuple[int, str, int]]:
    """(row from 1, text, position in the file) of every row whose text is right.

    Calls `complain(row, reason)` for the others; row 0 is the whole file.
    Raises `DataError` where pyarrow is missing or the file is compressed once more.
    """
    for row, batch, place, position in _rows(source, column, complain):
        text = _text(batch.column(0)[place], column, row, complain)
        if text is not None:
            yield row, text, position


def read_tables(source: Source, complain: Callable[[int, str], None]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(row from 1, all its columns by name, position in the file) of every row; otherwise as `read_rows`."""
    for row, batch, place, position in _rows(source, None, complain):
        try:
            yield row, {name: batch.column(name)[place].as_py() for name in batch.schema.names}, position
        except (UnicodeDecodeError, ValueError) as error:
            complain(row, f"not readable ({' '.join(str(error).split())})")


def _rows(
    source: Source, column: str | None, complain: Callable[[int, str], None]
) -> Iterator[tuple[int, Any, int, int]]:
    """(row from 1, a batch of rows, its place there, position in the file) of all rows; None: of all columns."""
    if source.compression is not None:
        raise DataError(f"{source.location}: Parquet is read in places and cannot be compressed whole; unpack the file")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{source.location}: reading Parquet needs pyarrow; install it: pip install 'trine[data]'"
        ) from None
    with Reader(source) as reader:
        row = 0
        try:
            # `pre_buffer` would fetch whole row groups, which can be gigabytes.
            file = pyarrow.parquet.ParquetFile(reader.file, pre_buffer=False, buffer_size=_PAGE_BUFFER_BYTES)
            problem = None if column is None else _column_problem(pyarrow, file.schema_arrow, column)
            if problem is not None or file.metadata.num_rows == 0:
                complain(0, problem or "the file has no rows")
                return
            columns = None if column is None else [column]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
                for place in range(len(batch)):
                    row += 1
                    yield row, batch, place, round(row / file.metadata.num_rows * source.size)
        except (pyarrow.ArrowException, OSError) as error:
            complain(row, f"not readable as Parquet ({' '.join(str(error).split())})")


def _text(value: Any, column: str, row: int, complain: Callable[[int, str], None]) -> str | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        complain(row, f"column {column!r}: byte 0x{error.object[error.start]:02x} is not valid UTF-8 ({error.reason})")
        return None
    if not text:
        complain(row, f"column {column!r} is {'null' if text is None else 'empty'}")
        return None
    assert isinstance(text, str)
    return text


def _column_problem(pyarrow: Any, schema: Any, column: str) -> str | None:
    if column not in schema.names:
        shown = ", ".join(map(repr, schema.names[:_COLUMNS_SHOWN]))
        more = f" and {len(schema.names) - _COLUMNS_SHOWN} more" if len(schema.names) > _COLUMNS_SHOWN else ""
        return f"no column {column!r}; the file has {shown}{more} (--text-column)"
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        return f"column {column!r} should hold strings, not {kind}"
    return None
