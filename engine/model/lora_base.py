"""Which model an adapter was trained on: its name, and marks of its weights that another model does not have.

    embeddings    SHA-256 of rows of the token embedding; none where it is quantized
    norm          SHA-256 of the weight of the norm before the head, where there is one
    layers        SHA-256 of rows of everything within the layers but experts; none where they are quantized

All are of numbers rounded to bfloat16, so that a checkpoint in float32 and its copy in bfloat16 have the same marks,
and of a few rows of each tensor, so that a large model takes no longer than a small one. Two models are held to be one
where all marks agree that both have: a model and its quantized copy pass, a model and one that was trained further do
not.

They stand in the header of adapter_model.safetensors, which PEFT reads over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import Opened, open_checkpoint
from trine.engine.model.weight_files import StoredTensor

_EMBEDDINGS, _NORM, _LAYERS, _NAME = "base_embeddings", "base_norm", "base_layers", "base_model"
_ROWS_OF_EMBEDDING = 64
_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A model by name and marks; `transposed`: its files hold linear layers as [in, out]."""

    name: str
    embeddings: str | None
    layers: str | None
    norm: str | None = None
    transposed: bool = False

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        marks = {_EMBEDDINGS: self.embeddings, _NORM: self.norm, _LAYERS: self.layers}
        return {_NAME: self.name, **{key: mark for key, mark in marks.items() if mark is not None}}

    @property
    def marks(self) -> str:
        """The marks of its weights, each cut short."""
        marks = (self.embeddings, self.norm, self.layers)
        return " ".join("none" if mark is None else mark[:8] for mark in marks)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Base | None:
        """What `metadata` wrote; None where it is not there, as in files that PEFT has written."""
        embeddings, norm, layers = (metadata.get(key) for key in (_EMBEDDINGS, _NORM, _LAYERS))
        if embeddings is None and norm is None:
            return None
        return cls(name=metadata.get(_NAME, ""), embeddings=embeddings, norm=norm, layers=layers)

    def agrees(self, other: Base) -> bool:
        """Whether the two can be one model."""
        pairs = (
            (self.embeddings, other.embeddings),
            (self.norm, other.norm),
            (self.layers, other.layers),
        )
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


def identify(folder: Path | str) -> Base:
    """The marks of a checkpoint folder. Raises `CheckpointError` where it is none."""
    with open_checkpoint(folder) as opened:
        return _identify(str(folder), opened)


def check_base(base: Base | None, adapter: Path | str, checkpoint: Path | str) -> None:
    """Raises `CheckpointError` where an adapter's record says that it was trained on another model."""
    if base is None:
        return
    found = identify(checkpoint)
    if not base.agrees(found):
        raise CheckpointError(
            f"the adapter in {adapter} was trained on {base.name!r}, and {checkpoint} holds other weights (marks "
            f"{base.marks}, here {found.marks}); give the checkpoint it was trained on"
        )


def _identify(name: str, opened: Opened) -> Base:
    embedding = next(rule.stored for rule in opened.rules if rule.ours == ("embed_tokens.weight",))
    norm = next((rule.stored for rule in opened.rules if rule.ours == ("norm.weight",)), None)
    # Experts, which no adapter changes, lie in several layouts.
    plain = [rule for rule in opened.rules if rule.expert is None and not rule.stacked]
    within = [rule for rule in plain if rule.ours[0].startswith("layers.")]
    layers = None
    if not opened.quantized:
        digest = hashlib.sha256()
        for rule in sorted(within, key=lambda rule: rule.stored):
            digest.update(rule.stored.encode())
            digest.update(_some_rows(opened.stored[rule.stored], _ROWS))
        layers = digest.hexdigest()
    return Base(
        name=name,
        embeddings=None if embedding in opened.quantized else _mark(opened.stored[embedding], _ROWS_OF_EMBEDDING),
        norm=None if norm is None else _mark(opened.stored[norm], _ROWS),
        layers=layers,
        transposed=any(rule.transpose for rule in within),
    )


def _mark(stored: StoredTensor, rows: int) -> str:
    return hashlib.sha256(_some_rows(stored, rows)).hexdigest()


def _some_rows(stored: StoredTensor, count: int) -> bytes:
    """The shape and some rows, spread evenly, in bfloat16."""
    part: Any = stored.file.get_slice(stored.name)
    rows = stored.shape[0]
    if len(stored.shape) == 1:
        tensor = part[:]
    else:
        tensor = torch.cat([part[row : row + 1] for row in sorted({i * rows // count for i in range(count)})])
    numbers: bytes = tensor.bfloat16().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{stored.shape}".encode() + numbers
