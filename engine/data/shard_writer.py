"""Writing one split of a prepared folder, in constant memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trine.engine.data.shards import Split, split_fingerprint


class ShardWriter:
    """Appends tokens and document borders of one split to files in `folder`.

    `add_tokens` may be called any number of times per document; `end_document` closes it.
    """

    def __init__(self, folder: Path, split: Split, *, dtype: npt.DTypeLike, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._shard: BinaryIO | None = None
        self._shards: list[str] = []
        self._documents = (folder / f"{split}-documents.bin").open("wb")
        self._hash = hashlib.sha256()
        self._document_start = 0
        self.num_tokens = 0
        self.num_documents = 0
        self.num_bytes = 0

    def add_tokens(self, tokens: npt.NDArray[Any], num_bytes: int) -> None:
        """Append tokens [n] of the open document; `num_bytes` is the UTF-8 length of the text they stand for."""
        tokens = np.ascontiguousarray(tokens, dtype=self._dtype)
        self._hash.update(tokens.data)
        self.num_bytes += num_bytes
        while len(tokens):
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            if self._shard is None or (room == self._shard_tokens and self.num_tokens):
                self._next_shard()
            assert self._shard is not None
            piece, tokens = tokens[:room], tokens[room:]
            self._shard.write(piece.data)
            self.num_tokens += len(piece)

    def end_document(self) -> None:
        """Close the open document: what follows belongs to the next one."""
        self._documents.write(self._document_start.to_bytes(8, "little"))
        self._document_start = self.num_tokens
        self.num_documents += 1

    def finish(self, tokenizer_fingerprint: str) -> dict[str, Any]:
        """Close the files and return what the manifest says about this split."""
        self._documents.write(self.num_tokens.to_bytes(8, "little"))
        self.close()
        documents = np.memmap(self._folder / f"{self._split}-documents.bin", dtype="<i8", mode="r")
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "fingerprint": split_fingerprint(self._hash, documents, tokenizer_fingerprint),
            "shards": self._shards,
        }

    def close(self) -> None:
        """Flush to the disk and close; safe to call twice."""
        for file in (self._shard, self._documents):
            if file is not None and not file.closed:
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def _next_shard(self) -> None:
        if self._shard is not None:
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
        name = f"{self._split}-{len(self._shards):05d}.bin"
        self._shards.append(name)
        self._shard = (self._folder / name).open("wb")
