"""Encoding a stream of text pieces with several threads, in order.

Pieces are gathered into jobs, jobs go to a pool, results come back in the order of the pieces. The caller's thread
reads and writes meanwhile. At most a few jobs per worker are under way, so memory does not grow with the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trine.engine.data.sources import Piece
from trine.engine.errors import DataError
from trine.engine.text.threads import one_thread_a_call
from trine.engine.text.tokenizer import Tokenizer

_JOB_CHARACTERS = 1 << 16
_JOB_PIECES = 1 << 10
# Enough that the workers go on while the caller waits for a slow read.
_JOBS_A_WORKER = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """A piece and its tokens, int64 or narrower [n]; with the end-of-text token where the piece ends its document."""

    piece: Piece
    ids: npt.NDArray[Any]
    num_bytes: int


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, pool: ThreadPoolExecutor, workers: int
) -> Iterator[Encoded]:
    """Each piece with its tokens, in order. Raises `DataError` where the vocabulary cannot spell a character."""
    under_way: deque[Future[list[Encoded]]] = deque()
    with one_thread_a_call():
        try:
            for job in _jobs(pieces):
                under_way.append(pool.submit(_encode_job, job, tokenizer))
                while len(under_way) > _JOBS_A_WORKER * workers:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _jobs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    job: list[Piece] = []
    size = 0
    for piece in pieces:
        job.append(piece)
        size += len(piece.text)
        if size >= _JOB_CHARACTERS or len(job) >= _JOB_PIECES:
            yield job
            job, size = [], 0
    if job:
        yield job


def _encode_job(job: list[Piece], tokenizer: Tokenizer) -> list[Encoded]:
    # Special tokens written in the text are text here: only `prepare` itself ends a document.
    encodings = tokenizer.encode_batch([piece.text for piece in job], parse_special=False)
    results = []
    for piece, ids in zip(job, encodings, strict=True):
        tokens = np.array([*ids, tokenizer.eos_id] if piece.ends else ids, dtype=np.uint32)
        if tokenizer.bytes_join_to_text and tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            raise DataError(_unknown(piece, tokenizer))
        results.append(Encoded(piece, tokens, len(piece.text.encode("utf-8"))))
    return results


def _unknown(piece: Piece, tokenizer: Tokenizer) -> str:
    character = next(c for c in piece.text if tokenizer.unk_id in tokenizer.encode(c, parse_special=False))
    return (
        f"{piece.document}: the character {character!r} (U+{ord(character):04X}) is not in the tokenizer's vocabulary; "
        "train the tokenizer on this text too, or use byte-level BPE"
    )
