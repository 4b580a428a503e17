"""A file of sources to a file of targets: `trine translate`.

The file is read twice. The first time every row is encoded and measured, so that what is wrong with any of them is said
before anything is computed. The second time rows are decoded in windows; within one, sources of like length share a
batch, in whose order nothing shows. A window is written whole, and an interrupted run goes on behind the last one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trine.engine.errors import DataError, UsageError
from trine.engine.generate.bulk_progress import BulkProgress, Summary
from trine.engine.generate.plain import generate
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.generate.search_settings import SearchSettings
from trine.engine.generate.seq2seq import end_of_source
from trine.engine.generate.texts_file import TextsFile
from trine.engine.generate.unfinished import Unfinished, check_out
from trine.engine.log import format_count, say
from trine.engine.model.transformer import Transformer
from trine.engine.text.prompt import encode_source
from trine.engine.text.tokenizer import Tokenizer

WINDOW_ROWS = 256
TEXT, JSON = ".txt", ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TranslateSettings:
    """`prefix` goes before every text; `truncate` cuts what is too long, which is refused otherwise. `batch_tokens`:
    source tokens that share a batch, those of each beam counted. `checkpoint`: where the weights come from, for the
    record.
    """

    checkpoint: str
    search: SearchSettings
    prefix: str = ""
    truncate: bool = False
    batch_tokens: int = 4096
    restart: bool = False


def translate_file(
    model: Transformer, tokenizer: Tokenizer, texts: TextsFile, out: Path, settings: TranslateSettings
) -> Summary:
    """Write the target of every row: a line of text (.txt), or an object with row, text and token_ids (.jsonl).

    A row of blanks has an empty target. In lines of text, line ends of a target become spaces.

    Raises `DataError` for a row that is wrong or too long, `UsageError` for a model without an encoder, another suffix,
    an `out` that exists, or an unfinished run of something else beside it.
    """
    if model.config.encoder is None:
        raise UsageError(f"a {model.config.family} model has no encoder for sources; use trine generate")
    check_out(out, (TEXT, JSON))
    rows = _Rows(model, tokenizer, texts, settings)
    job = {
        "checkpoint": settings.checkpoint,
        "texts": texts.fingerprint,
        "fields": list(texts.fields),
        "prefix": settings.prefix,
        "truncate": settings.truncate,
        "search": asdict(settings.search),
        "dtype": str(model.dtype),
    }
    total, tokens, cut = rows.measure()
    cut_note = f", {cut} of them cut to {model.config.max_positions} tokens" if cut else ""
    say(f"{texts.source.location}: {total} rows, {format_count(tokens)} tokens{cut_note}")
    write = _as_lines if out.suffix == TEXT else _as_objects
    with Unfinished(out, job, restart=settings.restart) as file:
        before = file.rows
        if before:
            say(f"{before} of {total} rows are there; going on with the rest")
        with BulkProgress(total, before, what="translating", unit="rows") as progress:
            for window in rows.windows(before):
                done = _translated(model, tokenizer, window, settings, progress)
                file.append(write(file.rows, done), rows=len(done))
        file.finish()
    return Summary(total, before, progress.tokens, progress.seconds)


class _Rows:
    """Rows of the file as ids; none of a row of blanks."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, texts: TextsFile, settings: TranslateSettings) -> None:
        self._config, self._tokenizer, self._texts, self._settings = model.config, tokenizer, texts, settings
        self._end = end_of_source(model.config, tokenizer)

    def measure(self) -> tuple[int, int, int]:
        """Rows, tokens, and rows that are cut. Raises `DataError` for the first wrong one, or where there is none."""
        rows = tokens = cut = 0
        for text in self._texts.rows():
            rows += 1
            length, longest = len(self._encode(text)), self._longest
            too_long = longest is not None and length > longest
            if too_long and not self._settings.truncate:
                raise DataError(
                    f"{self._texts.source.location}, row {rows}: {length} tokens but the model reads {longest}; split "
                    "the text, or cut all that are too long with --truncate"
                )
            cut += too_long
            tokens += length
        if not rows:
            raise DataError(f"{self._texts.source.location} holds no rows; give a file with texts")
        return rows, tokens, cut

    def windows(self, start: int) -> Iterator[list[list[int]]]:
        """From row `start` on."""
        rows = self._texts.rows(start)
        while window := list(islice(rows, WINDOW_ROWS)):
            yield [self._cut(self._encode(text)) for text in window]

    @property
    def _longest(self) -> int | None:
        return None if self._config.positions == "relative" else self._config.max_positions

    def _encode(self, text: Any) -> list[int]:
        assert isinstance(text, str)
        return encode_source(self._tokenizer, self._settings.prefix + text, self._end) if text.strip() else []

    def _cut(self, ids: list[int]) -> list[int]:
        if self._longest is None or len(ids) <= self._longest:
            return ids
        return ids[: self._longest] if self._end is None else [*ids[: self._longest - 1], self._end]


def _translated(
    model: Transformer,
    tokenizer: Tokenizer,
    window: Sequence[list[int]],
    settings: TranslateSettings,
    progress: BulkProgress,
) -> list[Completion | None]:
    """The target of each row of a window, in order."""
    search = settings.search
    params = SamplingParams(max_tokens=search.max_tokens, min_tokens=search.min_tokens, temperature=0.0)
    done: list[Completion | None] = [None] * len(window)
    progress.finish(sum(not ids for ids in window))
    for batch in _batches(window, settings.batch_tokens // (search.beams.num_beams if search.beams else 1)):
        found = generate(
            model, tokenizer, [window[row] for row in batch], params, batch_size=len(batch), beams=search.beams,
            no_repeat=search.no_repeat,
        )  # fmt: skip
        for row, completion in zip(batch, found, strict=True):
            done[row] = completion
            progress.count(completion.completion_tokens)
        progress.finish(len(batch))
    return done


def _batches(window: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows, longest sources first, so many together as their padded tokens allow."""
    batch: list[int] = []
    for row in sorted(range(len(window)), key=lambda row: -len(window[row])):
        if batch and (len(batch) + 1) * len(window[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        if window[row]:
            batch.append(row)
    if batch:
        yield batch


def _as_lines(first: int, done: Sequence[Completion | None]) -> bytes:
    return "".join(" ".join("" if one is None else one.text.splitlines()) + "\n" for one in done).encode()


def _as_objects(first: int, done: Sequence[Completion | None]) -> bytes:
    records = (
        {"row": row, "text": "", "token_ids": [], "finish_reason": "stop"}
        if one is None
        else {"row": row, "text": one.text, "token_ids": one.token_ids, "finish_reason": one.finish_reason}
        for row, one in enumerate(done, start=first)
    )
    return "".join(json.dumps(record) + "\n" for record in records).encode()
