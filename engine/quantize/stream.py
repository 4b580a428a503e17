"""Samples on their way through a model: their batches, and the hidden states before the next layer of each stack.

A model has one stack of layers, an encoder-decoder two: `encoder.layers` and `layers`, which are passed one after the
other. What the encoder made of the sources stays until the decoder has been passed, since each of its layers reads it.

Shapes: B samples of a batch, T tokens of each, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from trine.engine.quantize.hidden import HiddenStates
from trine.engine.quantize.samples import Batch

ENCODER, DECODER = "encoder.layers", "layers"


class Stream:
    """`folder`: where hidden states wait, in files of this `name`; None keeps them in memory."""

    def __init__(
        self, name: str, batches: Sequence[Batch], width: int, dtype: torch.dtype, folder: Path | None
    ) -> None:
        self.batches = batches
        sides = {DECODER: [batch.ids_BT for batch in batches]}
        sources = [batch.source_ids_BU for batch in batches if batch.source_ids_BU is not None]
        if sources:
            sides[ENCODER] = sources
        self._shapes = {stack: [tuple(ids.shape) for ids in side] for stack, side in sides.items()}
        self._starts = {stack: [0, *accumulate(ids.numel() for ids in side)] for stack, side in sides.items()}
        self._states = {
            stack: HiddenStates(
                (starts[-1], width), dtype, None if folder is None else folder / f"{name}-{stack.partition('.')[0]}.bin"
            )
            for stack, starts in self._starts.items()
        }

    def read(self, stack: str, number: int) -> Tensor:
        """Those of a batch, [B, T, C], in memory of their own or as a view."""
        start, stop = self._starts[stack][number : number + 2]
        return self._states[stack].read(start, stop).view(*self._shapes[stack][number], -1)

    def write(self, stack: str, number: int, x_BTC: Tensor) -> None:
        """Replace those of a batch."""
        self._states[stack].write(self._starts[stack][number], x_BTC.flatten(0, 1))

    def close(self) -> None:
        """Give memory or files free."""
        for states in self._states.values():
            states.close()


def num_states(batches: Sequence[Batch]) -> int:
    """Tokens whose hidden states a stream of these batches keeps."""
    sources = (0 if batch.source_ids_BU is None else batch.source_ids_BU.numel() for batch in batches)
    return sum(batch.ids_BT.numel() for batch in batches) + sum(sources)
