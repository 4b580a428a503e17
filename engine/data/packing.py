"""Several examples in one row, told apart by segment numbers, each with positions of its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trine.engine.data.permutation import IntArray


def pack(lengths: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
    """Examples dealt to rows, each to the first row with room for it, in order.

    An example has a length for each of its sides (a source and a target), and a row has room for so much of each.
    """
    rows: list[list[int]] = []
    left: list[list[int]] = []
    for number, sides in enumerate(lengths):
        fits = (r for r, free in enumerate(left) if all(map(operator.le, sides, free)))
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            left.append(list(room))
        rows[row].append(number)
        left[row] = list(map(operator.sub, left[row], sides))
    return rows


def laid_out(parts: Sequence[IntArray], rows: Sequence[Sequence[int]], *, filler: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, segments and positions, each [len(rows), longest row]; the padding has a segment of its own."""
    length = max(sum(len(parts[number]) for number in row) for row in rows)
    shape = (len(rows), length)
    ids, positions = np.full(shape, filler, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    # More than any row has examples, on both sides alike, so that padding meets nothing but padding.
    segments = np.full(shape, len(parts), dtype=np.int64)
    for row, numbers in enumerate(rows):
        place = 0
        for segment, number in enumerate(numbers):
            inside = slice(place, place + len(parts[number]))
            ids[row, inside], segments[row, inside] = parts[number], segment
            positions[row, inside] = np.arange(len(parts[number]))
            place = inside.stop
    return torch.from_numpy(ids), torch.from_numpy(segments), torch.from_numpy(positions)
