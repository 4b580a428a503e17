"""Samples: tokens that pass through a model so that its layers can be looked at, and what is to be predicted of them.

    text     windows of one length; each token predicts the next one
    pairs    of an encoder-decoder: a source and its target, each of its own length; every token of the target is
             predicted, from the source and the target before it
    text for an encoder-decoder      is its own target

However they came, a model gets batches: samples of the same lengths, as many as have about 1024 tokens together, none
of them padded. How they are put together does not depend on memory, because sums depend on it in their last bit.

Shapes: S samples, B samples of a batch, T tokens of each, U tokens of each source.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED
from trine.engine.model.config import ModelConfig

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class DataFile:
    """One file; bytes as it is stored, `sha256` over what it holds, decompressed."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Batch:
    """Samples of the same lengths; all int64.

    `ids_BT`: what the layers get, of an encoder-decoder those of the decoder. `targets_BT`: what each of them predicts,
    -100 where nothing. `source_ids_BU`: what the encoder gets.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    source_ids_BU: Tensor | None = None


@dataclass(frozen=True)
class Samples:
    """Text: `ids_ST` int64, and where they come from."""

    ids_ST: Tensor
    files: tuple[DataFile, ...]

    @property
    def num_tokens(self) -> int:
        """What is looked at of them, in each stack of layers."""
        return self.ids_ST.numel()

    def about(self) -> dict[str, Any]:
        """A JSON object: the settings and the files; the same for the same samples."""
        count, length = self.ids_ST.shape
        return _about("text", count, length, [self.ids_ST], self.files)

    def batches(self, config: ModelConfig) -> list[Batch]:
        """As a model of this config takes them."""
        rows = _rows(self.ids_ST)
        if config.encoder is not None:
            return [_pair(config, ids_BT, ids_BT) for ids_BT in rows]
        return [Batch(ids_BT, _append(ids_BT[:, 1:], IGNORED)) for ids_BT in rows]


@dataclass(frozen=True)
class Pairs:
    """`pairs`: ids of a source and of its target, int64, each ending with end-of-text; and where they come from."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    files: tuple[DataFile, ...]

    @property
    def num_tokens(self) -> int:
        """What is looked at of them, in the stack of layers that gets less."""
        return min(sum(len(pair[side]) for pair in self.pairs) for side in (0, 1))

    def about(self) -> dict[str, Any]:
        """A JSON object: the settings and the files; the same for the same samples. "length" is that of the longest."""
        sides = [side for pair in self.pairs for side in pair]
        return _about("pairs", len(self.pairs), max(map(len, sides)), sides, self.files)

    def batches(self, config: ModelConfig) -> list[Batch]:
        """As a model of this config takes them; those of the same lengths together."""
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for source, target in self.pairs:
            alike[len(source), len(target)].append((source, target))
        found = []
        for lengths in sorted(alike):
            sources_SU, targets_ST = (torch.stack(side) for side in zip(*alike[lengths], strict=True))
            size = _batch_size(max(lengths))
            parts = zip(torch.split(sources_SU, size), torch.split(targets_ST, size), strict=True)
            found += [_pair(config, source_BU, target_BT) for source_BU, target_BT in parts]
        return found


def _pair(config: ModelConfig, source_BU: Tensor, targets_BT: Tensor) -> Batch:
    """The decoder gets its start token and then the target but for its last one."""
    start = config.decoder_start_token_id
    assert start is not None
    ids_BT = torch.cat((torch.full_like(targets_BT[:, :1], start), targets_BT[:, :-1]), dim=1)
    return Batch(ids_BT, targets_BT, source_BU)


def _rows(ids_ST: Tensor) -> Sequence[Tensor]:
    return torch.split(ids_ST, _batch_size(ids_ST.shape[1]))


def _batch_size(length: int) -> int:
    return max(1, BATCH_TOKENS // length)


def _append(ids_BT: Tensor, token: int) -> Tensor:
    return torch.cat((ids_BT, torch.full_like(ids_BT[:, :1], token)), dim=1)


def _about(kind: str, count: int, length: int, tensors: Sequence[Tensor], files: Sequence[DataFile]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for data in _with_lengths(tensors):
        digest.update(data)
    return {
        "kind": kind,
        "samples": count,
        "length": length,
        "sha256": digest.hexdigest(),
        "files": [asdict(file) for file in files],
    }


def _with_lengths(tensors: Sequence[Tensor]) -> Iterator[bytes]:
    if len(tensors) > 1:  # of one, its shape is told
        yield torch.tensor([len(one) for one in tensors]).numpy().tobytes()
    for tensor in tensors:
        yield tensor.numpy().tobytes()
