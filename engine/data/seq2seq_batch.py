"""What an encoder-decoder is fed: sources, and the targets that they should become.

Several examples may share a row of sources and a row of targets (`pack`): both then have segment numbers, and example n
of a row attends to source n alone.

Shapes: B rows, S source tokens in a row, T target tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED, moved
from trine.engine.data.packing import laid_out, pack
from trine.engine.data.permutation import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqBatch:
    """Rows of sources and of targets; all tensors int64.

    ids_BT: what the decoder reads, the start token and then the target but its last token. targets_BT: the targets,
    -100 behind them. Segments and positions are None where every row is one example without padding.
    counts: of each sum that the objective makes, how many terms this batch has. num_tokens: tokens that are not
    padding, of sources and targets.
    """

    source_ids_BS: Tensor
    source_segments_BS: Tensor | None
    source_positions_BS: Tensor | None
    ids_BT: Tensor
    targets_BT: Tensor
    segment_ids_BT: Tensor | None
    positions_BT: Tensor | None
    counts: tuple[int, ...]
    num_tokens: int

    def to(self, device: torch.device | str) -> Seq2SeqBatch:
        """The same batch on another device."""
        return moved(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqLayout:
    """How pairs become a batch: the token that the decoder starts with, the one that fills, and the longest rows.

    Rows are as long as the longest one of a batch. With `packed`, pairs are put together as long as both sides stay
    within `source_len` and `target_len`.
    """

    start_id: int
    pad_id: int
    source_len: int
    target_len: int
    packed: bool = False

    def batch(self, sources: Sequence[IntArray], targets: Sequence[IntArray]) -> Seq2SeqBatch:
        """Pairs of tokens, each ending with end-of-text where it should, as a batch."""
        lengths = [(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
        rows = pack(lengths, (self.source_len, self.target_len)) if self.packed else [[i] for i in range(len(lengths))]
        read = [np.concatenate([[self.start_id], target[:-1]]) for target in targets]
        plain = len(rows) == len(lengths) and len(set(lengths)) == 1
        sides = {}
        for name, parts, filler in (
            ("source", sources, self.pad_id),
            ("read", read, self.pad_id),
            ("target", targets, IGNORED),
        ):
            sides[name] = laid_out(parts, rows, filler=filler)
        return Seq2SeqBatch(
            source_ids_BS=sides["source"][0],
            source_segments_BS=None if plain else sides["source"][1],
            source_positions_BS=None if plain else sides["source"][2],
            ids_BT=sides["read"][0],
            targets_BT=sides["target"][0],
            segment_ids_BT=None if plain else sides["read"][1],
            positions_BT=None if plain else sides["read"][2],
            counts=(sum(length for _, length in lengths),),
            num_tokens=sum(source + target for source, target in lengths),
        )
