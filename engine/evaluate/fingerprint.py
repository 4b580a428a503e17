"""What tells one model from all others: a hash of everything in its folder that its answers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from trine.engine.errors import CheckpointError

# Weights, their index, and what says how they are computed with, of a checkpoint or an adapter.
_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")
_TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def model_fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """SHA-256 (hex) over names and contents of weights, configs and tokenizer of a checkpoint and its adapter.

    Everything is read once, so a large model takes as long as its files take to be read. Raises `CheckpointError` for
    a file that cannot be.
    """
    digest = hashlib.sha256()
    for each in (folder, adapter):
        if each is None:
            continue
        for path in _files(each):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
            digest.update(f"{path.name} {content}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """In the order of their names."""
    yield from sorted({path for pattern in (*_FILES, *_TEXT) for path in folder.glob(pattern)})
