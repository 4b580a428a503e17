"""What quantizing takes of memory, reckoned before it is taken, so that a limit is kept.

At any time there is one layer of the model, and of it one of these:

    inputs      hidden states of a batch inside the layer, and the statistics of some of its linear layers
    results     codes (or pruned weights) found so far, and the copies that finding them for one weight takes, or for
                two that share an input

Statistics that do not fit together are gathered in several passes and wait on the disk; hidden states of all samples
too where they do not fit beside all this. What is computed is the same. Where the largest piece does not fit, that is
an error that names it.

The limit is for what comes on top of Python and its libraries (some 400 MiB).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trine.engine.errors import UsageError
from trine.engine.log import format_bytes
from trine.engine.quantize.statistics import SAMPLE_ROWS

# Copies of a weight, in numbers of 4 bytes, that methods hold at once, and of H; seen with the methods there are.
_WEIGHT_COPIES, _HESSIAN_COPIES = 8, 6
# Numbers of 4 bytes for each token in a layer: so many times its width, and so many times its widest inner layer.
_WIDTHS, _INNER_WIDTHS = 10, 4
# And for each token of a source: its hidden states, keys and values, each with a copy.
_SOURCE_WIDTHS = 6


def statistics_bytes(width: int) -> int:
    """Of the inputs [K] of one linear layer."""
    return 4 * (width * width + 2 * SAMPLE_ROWS * width + 2 * width)


def method_bytes(num_features: int, width: int, *, calibrated: bool) -> int:
    """What finding codes for a weight [N, K] takes, beside codes and statistics."""
    hessians = _HESSIAN_COPIES * width * width if calibrated else 0
    return 4 * (_WEIGHT_COPIES * num_features * width + hessians)


def batch_bytes(tokens: int, width: int, inner_width: int) -> int:
    """Hidden states of so many tokens inside a layer."""
    return 4 * tokens * (_WIDTHS * width + _INNER_WIDTHS * inner_width)


def source_bytes(tokens: int, width: int) -> int:
    """What the decoder of an encoder-decoder reads of so many tokens of sources."""
    return 4 * tokens * _SOURCE_WIDTHS * width


def parameter_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """A part of the model in `dtype`."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


@dataclass
class Budget:
    """`limit` None: nothing is refused; hidden states may take `free`, and so may the statistics of a layer.

    `needed` is the most that was reckoned so far, without the hidden states of all samples.
    """

    limit: int | None
    free: int
    needed: int = 0

    def require(self, what: str, needed: int) -> None:
        """Reckon with a piece. Raises `UsageError` naming it where it does not fit."""
        if self.limit is not None and needed > self.limit:
            raise UsageError(
                f"{what} takes {format_bytes(needed)}, --max-memory is {format_bytes(self.limit)}; give at least that"
            )
        self.needed = max(self.needed, needed)

    def keeps(self, num_bytes: int) -> bool:
        """Whether so many bytes of hidden states stay in memory, beside everything else."""
        return num_bytes <= (self.free if self.limit is None else self.limit - self.needed)

    def passes(self, groups: Iterable[Sequence[str]], widths: Iterable[int], other: int) -> list[list[Sequence[str]]]:
        """Groups of layers whose statistics are gathered together, `other` being taken at that time.

        Raises `UsageError` where one of them does not fit alone.
        """
        found: list[list[Sequence[str]]] = []
        room = 0
        for group, width in zip(groups, widths, strict=True):
            size = statistics_bytes(width)
            self.require(f"the inputs of {group[0]}", other + size)
            if not found or size > room:
                found.append([])
                room = self.free if self.limit is None else self.limit - other
            found[-1].append(group)
            room -= size
        return found
