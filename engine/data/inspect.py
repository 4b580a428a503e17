"""What is in a prepared folder: `trine data inspect`.

Statistics are counted over a whole split, in constant memory. Samples are what training would be fed: the same windows
in the same order, with their document borders and with the targets that take part in the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trine.engine.data.batch import IGNORED, make_batch
from trine.engine.data.progress import ByteProgress
from trine.engine.data.samples import SampleStream, ring_window
from trine.engine.data.shards import Split, TokenShards
from trine.engine.errors import UsageError
from trine.engine.text.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the documents of a split are, in tokens with the end-of-text token.

    histogram: (shortest, longest + 1, documents) for each power of two that occurs in between.
    """

    least: int
    percentile_5: int
    median: int
    percentile_95: int
    most: int
    mean: float
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class FrequentToken:
    """An id, its text alone, and how often it occurs; `share` is of all tokens."""

    token_id: int
    text: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class SplitStatistics:
    """Counts over a whole split. `bytes_per_token` leaves the end-of-text tokens out."""

    tokens: int
    documents: int
    bytes: int
    bytes_per_token: float | None
    vocab_size: int
    ids_used: int
    unknown_tokens: int | None  # None where the tokenizer can spell everything
    lengths: Lengths
    most_frequent: list[FrequentToken]


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a sample that belongs to one document.

    first_position, length: where it lies in the sample. from_token: which token of the document it begins with.
    runs: its text in stretches (text, whether loss is taken at those positions), special tokens shown.
    """

    document: int
    from_token: int
    first_position: int
    length: int
    targets: int
    runs: list[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class InspectedSample:
    """One sample as training sees it. loss: for each position, whether its target takes part in the loss."""

    number: int
    first_token: int
    ids: list[int]
    targets: list[int]
    loss: list[bool]
    segments: list[Segment]


def split_statistics(shards: TokenShards, tokenizer: Tokenizer, *, top: int) -> SplitStatistics:
    """Count a whole split; `top` frequent tokens are listed. Progress is shown."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    size = shards.dtype.itemsize
    with ByteProgress(shards.num_tokens * size, what="counting tokens") as progress:
        for first in range(0, shards.num_tokens, _CHUNK_TOKENS):
            tokens = shards.read(first, min(_CHUNK_TOKENS, shards.num_tokens - first))
            counts += np.bincount(tokens, minlength=len(counts))
            progress.update((first + len(tokens)) * size)
    order = np.argsort(-counts, kind="stable")[:top]
    frequent = [
        FrequentToken(token_id, tokenizer.token_text(token_id), count, count / shards.num_tokens)
        for token_id, count in zip(order.tolist(), counts[order].tolist(), strict=True)
        if count
    ]
    of_text = shards.num_tokens - shards.num_documents
    return SplitStatistics(
        tokens=shards.num_tokens,
        documents=shards.num_documents,
        bytes=shards.num_bytes,
        bytes_per_token=shards.num_bytes / of_text if of_text else None,
        vocab_size=tokenizer.vocab_size,
        ids_used=int(np.count_nonzero(counts)),
        unknown_tokens=None if tokenizer.unk_id is None else int(counts[tokenizer.unk_id]),
        lengths=_lengths(shards),
        most_frequent=frequent,
    )


def inspected_samples(
    folder: Path, split: Split, tokenizer: Tokenizer, *, count: int, seq_len: int, seed: int
) -> Iterator[InspectedSample]:
    """The first `count` samples of training with this seed and length, or the first windows of validation."""
    shards = TokenShards.open(folder, split)
    if shards.num_tokens < 2:
        raise UsageError(f"{folder} has {shards.num_tokens} token in its {split} split, too few for a sample")
    if seq_len < 1:
        raise UsageError(f"sequence length {seq_len}; give at least 1")
    length = min(seq_len, shards.num_tokens - 1)
    if split == "train":
        stream = SampleStream([(folder, 1.0)], seq_len=length, seed=seed)
        firsts = [first for _, first in stream.places(0, count)]
    else:
        firsts = list(range(0, shards.num_tokens - 1, length))[:count]
    for number, first in enumerate(firsts):
        yield _sample(shards, tokenizer, number, first, length, wraps=split == "train")


def _sample(
    shards: TokenShards, tokenizer: Tokenizer, number: int, first: int, length: int, *, wraps: bool
) -> InspectedSample:
    count = length + 1 if wraps else min(length + 1, shards.num_tokens - first)
    window = ring_window(shards, first, count)
    batch = make_batch([window], seq_len=count - 1, document_mask=True)
    ids, targets = batch.ids_BT[0].tolist(), batch.targets_BT[0].tolist()
    loss = [target != IGNORED for target in targets]
    begins = [0, *(start for start in window.starts.tolist() if 0 < start < count - 1)]
    segments = []
    for begin, end in zip(begins, [*begins[1:], count - 1], strict=True):
        token = (first + begin) % shards.num_tokens
        document, document_start = shards.document_at(token)
        runs = [
            (tokenizer.decode([ids[i] for i in group], skip_special_tokens=False), taken)
            for taken, group in groupby(range(begin, end), key=loss.__getitem__)
        ]
        segments.append(Segment(document, token - document_start, begin, end - begin, sum(loss[begin:end]), runs))
    return InspectedSample(number, first, ids, targets, loss, segments)


def _lengths(shards: TokenShards) -> Lengths:
    found: Counter[int] = Counter()
    for lengths in shards.document_lengths():
        values, counts = np.unique(lengths, return_counts=True)
        found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    values = np.array(sorted(found))
    counts = np.array([found[value] for value in values.tolist()])
    bounds: list[tuple[int, int, int]] = []
    for power in range(int(values[-1]).bit_length()):
        low, high = 1 << power, 2 << power
        bounds.append((low, high, int(counts[(values >= low) & (values < high)].sum())))
    while bounds[0][2] == 0:
        bounds.pop(0)
    return Lengths(
        least=int(values[0]),
        percentile_5=_quantile(values, counts, 0.05),
        median=_quantile(values, counts, 0.5),
        percentile_95=_quantile(values, counts, 0.95),
        most=int(values[-1]),
        mean=shards.num_tokens / shards.num_documents,
        histogram=bounds,
    )


def _quantile(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], share: float) -> int:
    """The smallest value that at least `share` of all do not exceed."""
    reached = np.cumsum(counts)
    return int(values[np.searchsorted(reached, share * reached[-1])])
