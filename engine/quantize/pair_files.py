"""Pairs for encoder-decoders: JSON lines with a source and its target, each as tokens that end with end-of-text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.data.examples import Record, read_records
from trine.engine.data.files import find_sources
from trine.engine.errors import DataError
from trine.engine.log import say
from trine.engine.quantize.calibration import TEXT_BYTES, check_sizes, choose, first_fields, hashed, names_of
from trine.engine.quantize.samples import Pairs
from trine.engine.text.tokenizer import Tokenizer

PAIRS, HELD_OUT = 1024, 128


@dataclass(frozen=True)
class Fields:
    """The names of the fields with source and target."""

    source: str = "source"
    target: str = "target"

    def are_in(self, paths: Sequence[Path]) -> bool:
        """Whether the first line of the first file has both."""
        return {self.source, self.target} <= set(first_fields(find_sources(paths)[0]))


def read_pairs(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    fields: Fields,
    *,
    samples: int | None = None,
    length: int | None = None,
    context: int,
    held_out: bool = False,
) -> tuple[Pairs, Pairs | None]:
    """(pairs, others held out for measuring, where there are any and `held_out` asks for them).

    `samples` None takes up to 1024 and leaves a ninth of few; sources and targets are cut to `length` tokens, None is
    512, or the model's `context` where that is less. Raises `DataError` for files that are missing or empty, and for
    lines that are broken or lack a field; `UsageError` for a length beyond the context.
    """
    length = check_sizes(samples, length, context)
    sources = find_sources(paths)
    every = -(-sum(source.size for source in sources) // TEXT_BYTES)
    records = [
        record for path in paths for number, record in enumerate(read_records(path), start=1) if number % every == 0
    ]
    what = f"{names_of(sources)} hold {len(records)} pairs"
    kept, apart = choose(len(records), samples, most=PAIRS, spare=HELD_OUT if held_out else 0, what=what)
    files = tuple(hashed(source) for source in sources)
    found = [
        Pairs(_encoded([records[number] for number in numbers], tokenizer, fields, length), files)
        for numbers in (kept, apart)
        if numbers
    ]
    return found[0], found[1] if apart else None


def _encoded(
    records: Sequence[Record], tokenizer: Tokenizer, fields: Fields, length: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Both sides of each pair, cut to `length`, which is said."""
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer names no end-of-text token, which every source and target ends with")
    sides, cut = [], 0
    for field in (fields.source, fields.target):
        rows = tokenizer.encode_batch([record.text(field) for record in records], parse_special=False)
        cut += sum(len(ids) >= length for ids in rows)
        sides.append([torch.tensor([*ids[: length - 1], tokenizer.eos_id], dtype=torch.int64) for ids in rows])
    if cut:
        say(f"{cut} texts of {len(records)} pairs are cut to {length} tokens (--calibration-length)")
    return tuple(zip(*sides, strict=True))
