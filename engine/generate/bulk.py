"""A file of texts to vectors: `trine embed` and `trine classify`.

The file is read twice. The first time every row is encoded and measured, so that what is wrong with any of them is said
before anything is computed, and the time left is known. The second time rows go through the engine in windows; within
one, texts of like length share a batch. A window is written whole, and an interrupted run goes on behind the last one.

Shapes: R rows, D numbers of a vector, L labels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trine.engine.errors import DataError, UsageError
from trine.engine.generate.bulk_progress import BulkProgress, Summary
from trine.engine.generate.classes import class_record, tag_record
from trine.engine.generate.engine import Engine, EngineConfig, PoolingRequest
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.pooling_info import PoolingInfo, describe
from trine.engine.generate.texts_file import PARQUET, Row, TextsFile
from trine.engine.generate.unfinished import Unfinished, check_out
from trine.engine.log import format_count, say
from trine.engine.model.checkpoint import resolve_checkpoint

WINDOW_ROWS = 1024
# What names of results end in.
EMBEDDINGS, CLASSES = (".npy", PARQUET), (".jsonl",)
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkSettings:
    """`prefix` goes before every text; `truncate` cuts what is too long, which is refused otherwise.

    `checkpoint` and `dtype`: where the numbers come from, for the record.
    """

    checkpoint: str
    dtype: str
    prefix: str = ""
    truncate: bool = False
    restart: bool = False


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A row as the model reads it. `words` and the word of each token, of a tagger."""

    ids: list[int]
    types: list[int] | None = None
    words: list[str] | None = None
    word_of: list[int | None] | None = None


def open_for_vectors(
    checkpoint: Path, *, dtype: str, device: str, batch_tokens: int
) -> tuple[Engine, PoolingInfo, str]:
    """An engine around a model that gives vectors, what they are, and the dtype they are computed in.

    Raises `UsageError` where the model gives none, or for sizes that cannot be.
    """
    if batch_tokens < 1:
        raise UsageError(f"--batch-tokens is {batch_tokens}; give 1 or more")
    folder = resolve_checkpoint(checkpoint)
    model, tokenizer = load_for_inference(folder, dtype=dtype, device=device)
    info = describe(model, folder)
    if info is None:
        raise UsageError(
            f"{folder} generates text and gives no vectors; take an encoder, or a folder whose modules.json says how "
            "tokens become one vector"
        )
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=batch_tokens, max_running=1))
    return engine, info, str(model.dtype).removeprefix("torch.")


def prefix_of(info: PoolingInfo, prefix: str | None, name: str | None) -> str:
    """What goes before every text: `prefix`, the prompt called `name`, or the folder's default prompt.

    Raises `UsageError` for a prompt that the folder does not have.
    """
    assert prefix is None or name is None
    if prefix is not None:
        return prefix
    known, wanted = dict(info.prompts), info.default_prompt if name is None else name
    if wanted is None:
        return ""
    if wanted not in known:
        raise UsageError(f"there is no prompt {wanted!r}; the checkpoint has {', '.join(known) or 'none'}")
    return known[wanted]


def embed_file(engine: Engine, info: PoolingInfo, texts: TextsFile, out: Path, settings: BulkSettings) -> Summary:
    """Write the embedding of every row: float32 [R, D] as .npy, or a column `embedding` as .parquet.

    Raises `UsageError` for another suffix, an `out` that exists or a model without embeddings; see also `_run`.
    """
    check_out(out, EMBEDDINGS)
    if info.kind != "embedding":
        raise UsageError("this model gives classes and no embeddings; use `trine classify`")
    if out.suffix == PARQUET:
        import pyarrow.parquet  # noqa: F401  missing is said now, not at the end

    def header(rows: int) -> bytes:
        buffer = io.BytesIO()
        shape = (rows, info.dim)
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return buffer.getvalue()

    def write(first: int, rows: Sequence[_Encoded], vectors: Sequence[Vector]) -> bytes:
        return np.stack(vectors).astype("<f4").tobytes()

    return _run(engine, info, texts, out, settings, what="embedding", header=header, write=write)


def classify_file(engine: Engine, info: PoolingInfo, texts: TextsFile, out: Path, settings: BulkSettings) -> Summary:
    """Write a JSON line for every row: its class and the probabilities, or the label of each word.

    Raises `UsageError` for another suffix, an `out` that exists or a model without classes; see also `_run`.
    """
    check_out(out, CLASSES)
    if info.kind == "embedding":
        raise UsageError("this model gives embeddings and no classes; use `trine embed`")

    def write(first: int, rows: Sequence[_Encoded], vectors: Sequence[Vector]) -> bytes:
        lines = []
        for number, (row, vector) in enumerate(zip(rows, vectors, strict=True), start=first):
            if row.words is not None and row.word_of is not None:
                record = tag_record(info, row.words, row.word_of, vector)
            else:
                record = class_record(info, vector, is_pair=len(texts.fields) == 2)
            lines.append(json.dumps({"row": number, **record}) + "\n")
        return "".join(lines).encode()

    return _run(engine, info, texts, out, settings, what="classifying", header=lambda rows: b"", write=write)


def _run(
    engine: Engine,
    info: PoolingInfo,
    texts: TextsFile,
    out: Path,
    settings: BulkSettings,
    *,
    what: str,
    header: Callable[[int], bytes],
    write: Callable[[int, Sequence[_Encoded], Sequence[Vector]], bytes],
) -> Summary:
    """Raises `DataError` for a row that is wrong, too long, or whose numbers are not finite, `UsageError` where an
    unfinished run of something else lies beside `out`.
    """
    encode = _Encoder(engine, info, texts, settings)
    job = {
        "checkpoint": settings.checkpoint,
        "texts": texts.fingerprint,
        "fields": list(texts.fields),
        "prefix": settings.prefix,
        "truncate": settings.truncate,
        "dtype": settings.dtype,
    }
    total, tokens, cut = encode.measure()
    cut_note = f", {cut} of them cut to {info.max_tokens} tokens" if cut else ""
    say(f"{texts.source.location}: {total} rows, {format_count(tokens)} tokens{cut_note}")
    with Unfinished(out, job, restart=settings.restart) as file:
        before = file.rows
        if before:
            say(f"{before} of {total} rows are there; going on with the rest")
        if file.empty:
            file.append(header(total), rows=0)
        with BulkProgress(total, before, what=what, unit="rows") as progress:
            for rows in encode.windows(before):
                vectors = _vectors(engine, rows, file.rows, texts)
                file.append(write(file.rows, rows, vectors), rows=len(rows))
                progress.count(sum(len(row.ids) for row in rows))
                progress.finish(len(rows))
        if out.suffix == PARQUET:
            file.finish(_as_parquet(file.partial))
        else:
            file.finish()
    return Summary(total, before, progress.tokens, progress.seconds)


class _Encoder:
    """Rows of the file as ids."""

    def __init__(self, engine: Engine, info: PoolingInfo, texts: TextsFile, settings: BulkSettings) -> None:
        self._tokenizer, self._info, self._texts, self._settings = engine.tokenizer, info, texts, settings
        if info.kind == "tagging" and settings.truncate:
            raise UsageError("words that are cut off cannot be tagged; leave out --truncate, or shorten the rows")

    def measure(self) -> tuple[int, int, int]:
        """Rows, tokens, and rows that are cut. Raises `DataError` for the first wrong one, or where there is none."""
        rows = tokens = cut = 0
        longest, truncate = self._info.max_tokens, self._settings.truncate
        for row in chain.from_iterable(self._windows(0, cutting=False)):
            rows += 1
            length = len(row.ids)
            if not length:
                raise DataError(f"{self._place(rows)}: the text has no tokens; leave it out")
            if length > longest and not truncate:
                raise DataError(
                    f"{self._place(rows)}: {length} tokens but the model takes {longest}; shorten the text, or cut all "
                    "that are too long with --truncate"
                )
            cut += length > longest
            tokens += min(length, longest)
        if not rows:
            raise DataError(f"{self._texts.source.location} holds no rows; give a file with texts")
        return rows, tokens, cut

    def windows(self, start: int) -> Iterator[list[_Encoded]]:
        """From row `start` on."""
        return self._windows(start, cutting=self._settings.truncate)

    def _windows(self, start: int, *, cutting: bool) -> Iterator[list[_Encoded]]:
        rows = self._texts.rows(start)
        while window := list(islice(rows, WINDOW_ROWS)):
            yield self._encode(window, self._info.max_tokens if cutting else None)

    def _encode(self, window: Sequence[Row], max_tokens: int | None) -> list[_Encoded]:
        if self._info.kind == "tagging":
            words = [_as_words(row) for row in window]
            return [
                _Encoded(ids, words=each, word_of=word_of)
                for each, (ids, word_of) in zip(words, self._tokenizer.encode_words(words), strict=True)
            ]
        prepared = [self._prepared(row) for row in window]
        return [
            _Encoded(ids, types if self._info.token_types > 1 and any(types) else None)
            for ids, types in self._tokenizer.encode_inputs(prepared, max_tokens=max_tokens)
        ]

    def _prepared(self, row: Row) -> str | tuple[str, str]:
        assert not isinstance(row, list)
        if isinstance(row, tuple):
            return (self._lowered(self._settings.prefix + row[0]), self._lowered(row[1]))
        return self._lowered(self._settings.prefix + row)

    def _lowered(self, text: str) -> str:
        return text.lower() if self._info.lower_case else text

    def _place(self, row: int) -> str:
        return f"{self._texts.source.location}, row {row}"


def _as_words(row: Row) -> list[str]:
    assert not isinstance(row, tuple)
    return row if isinstance(row, list) else row.split()


def _vectors(engine: Engine, rows: Sequence[_Encoded], first: int, texts: TextsFile) -> list[Vector]:
    """Of a window, in order."""
    types = None
    if any(row.types is not None for row in rows):
        types = tuple(tuple(row.types or (0,) * len(row.ids)) for row in rows)
    engine.add(PoolingRequest(id="window", inputs=tuple(tuple(row.ids) for row in rows), token_types=types))
    found: dict[int, Vector] = {}
    try:
        while engine.has_work:
            for output in engine.step():
                if output.vector is None:
                    raise DataError(f"{texts.source.location}, row {first + output.choice + 1}: {output.error}")
                found[output.choice] = output.vector
    finally:
        engine.abort("window")
    return [found[number] for number in range(len(rows))]


def _as_parquet(partial: Path) -> Path:
    """The array as a Parquet file beside it."""
    import pyarrow
    import pyarrow.parquet

    vectors_RD: Vector = np.load(partial, mmap_mode="r")
    kind = pyarrow.list_(pyarrow.float32(), vectors_RD.shape[1])
    schema = pyarrow.schema([pyarrow.field("embedding", kind, nullable=False)])
    made = partial.with_suffix(".parquet")
    with pyarrow.parquet.ParquetWriter(made, schema) as writer:
        for begin in range(0, len(vectors_RD), WINDOW_ROWS):
            flat = pyarrow.array(vectors_RD[begin : begin + WINDOW_ROWS].reshape(-1))
            column = pyarrow.FixedSizeListArray.from_arrays(flat, type=kind)
            writer.write_batch(pyarrow.record_batch([column], schema=schema))
    return made
