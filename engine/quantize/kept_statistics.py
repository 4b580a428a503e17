"""The statistics of a layer's inputs until they are used: in memory, or on the disk where they do not fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.quantize.statistics import InputStatistics


class KeptStatistics:
    """By the names of linear layers; those of one group share theirs. `folder` None keeps them in memory."""

    def __init__(self, groups: Sequence[Sequence[str]], folder: Path | None) -> None:
        self._group = {name: group[0] for group in groups for name in group}
        self._folder = folder
        self._kept: dict[str, InputStatistics] = {}

    def group_of(self, name: str) -> str | None:
        """The same for layers with one input; None for a layer that is not known here."""
        return self._group.get(name)

    def put(self, name: str, statistics: InputStatistics) -> None:
        """Keep, or replace, those of this layer's group."""
        group = self._group[name]
        if self._folder is None:
            self._kept[group] = statistics
            return
        values = ((field.name, getattr(statistics, field.name)) for field in fields(statistics))
        tensors = {name: (one if isinstance(one, Tensor) else torch.tensor(one)) for name, one in values}
        save_file(tensors, self._path(group))

    def get(self, name: str) -> InputStatistics:
        """Those of this layer's group."""
        group = self._group[name]
        if self._folder is None:
            return self._kept[group]
        stored: Mapping[str, Tensor] = load_file(self._path(group))
        return InputStatistics(*(one if one.dim() else int(one) for one in map(stored.get, _NAMES)))  # type: ignore[arg-type, union-attr]

    def _path(self, group: str) -> Path:
        assert self._folder is not None
        return self._folder / f"statistics-{group}.safetensors"


_NAMES = [field.name for field in fields(InputStatistics)]
