"""Token shards: prepared text on disk, read by memory mapping.

A prepared folder holds, for each split (`train`, `validation`):

    train-00000.bin ...      the tokens, little-endian uint16 or uint32, one stream cut into files of equal length
    train-documents.bin      little-endian int64: the index of each document's first token, then the number of tokens
    tokenizer/               the tokenizer the text was encoded with
    manifest.json            what all this is and was made from; written last, so a folder without it is unfinished

Every document ends with the end-of-text token. A split's `fingerprint` is a hash of its tokens and document borders
and of the tokenizer: it does not depend on paths, shard size or the number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trine.engine.errors import DataError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises `DataError` if the folder is none, or of another version."""
    path = folder / MANIFEST
    if folder.is_file():
        raise DataError(
            f"{folder} is a file, and prepared data is a folder; make one of it by `trine data prepare`, or where its "
            "lines are examples to learn from, say of what kind: objective.kind"
        )
    if not path.is_file():
        raise DataError(f"no prepared data in {folder} (it has no {MANIFEST}); make it with `trine data prepare`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the data again") from None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version}, this Trine reads {FORMAT_VERSION}; prepare it again")
    result: dict[str, Any] = manifest
    return result


class TokenShards:
    """One split of a prepared folder: a stream of tokens with document borders.

    Attributes: num_tokens (end-of-text tokens included), num_documents, num_bytes (UTF-8 bytes of the text, end of
    text not counted), fingerprint, tokenizer_fingerprint, eos_id, dtype (of the stored tokens).
    """

    def __init__(self, folder: Path | str, split: Split = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        manifest = read_manifest(self.folder)
        facts = manifest["splits"].get(split)
        if facts is None:
            remedy = "--validation FILE or --validation-fraction X" if split == "validation" else "training files"
            raise DataError(f"{self.folder} has no {split} split; prepare it with {remedy}")
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.num_tokens: int = facts["num_tokens"]
        self.num_documents: int = facts["num_documents"]
        self.num_bytes: int = facts["num_bytes"]
        self.fingerprint: str = facts["fingerprint"]
        self._shard_tokens: int = manifest["options"]["shard_tokens"]
        self._shards = [self.folder / name for name in facts["shards"]]
        self._check_sizes()

    @classmethod
    def open(cls, folder: Path | str, split: Split = "train") -> TokenShards:
        """Open a split; raises `DataError` if it is missing or its files do not have the sizes in the manifest."""
        return cls(folder, split)

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer the text was encoded with."""
        return self.folder / "tokenizer"

    @property
    def files(self) -> list[Path]:
        """The files of the split: tokens, then document borders."""
        return [*self._shards, self.folder / f"{self.split}-documents.bin"]

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + count) as int64 [count]. Raises `IndexError` outside the stream."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            shard, offset = divmod(start + filled, self._shard_tokens)
            piece = self._maps[shard][offset : offset + count - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
        return tokens

    def document_starts(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Indices of the tokens in [start, start + count) that begin a document, int64, ascending."""
        first, last = np.searchsorted(self._starts, (start, start + count))
        return np.asarray(self._starts[first:last])

    def document_at(self, token: int) -> tuple[int, int]:
        """The number of the document that holds a token, and the index of the document's first token."""
        number = int(np.searchsorted(self._starts, token, side="right")) - 1
        return number, int(self._starts[number])

    def document_bounds(self, number: int) -> tuple[int, int]:
        """Index of a document's first token, and of the one behind its last, which is end-of-text."""
        begin, end = self._documents[number : number + 2].tolist()
        return begin, end

    def document_lengths(self, *, chunk: int = 1 << 20) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens of each document, end-of-text included, in order, `chunk` documents at a time."""
        for first in range(0, self.num_documents, chunk):
            yield np.diff(self._documents[first : first + chunk + 1])

    def verify(self) -> None:
        """Read everything and compare with the fingerprint; raises `DataError` on a difference."""
        digest = hashlib.sha256()
        for shard in self._maps:
            digest.update(np.ascontiguousarray(shard).data)
        if split_fingerprint(digest, self._documents, self.tokenizer_fingerprint) != self.fingerprint:
            raise DataError(f"the {self.split} split of {self.folder} is damaged; prepare it again with --overwrite")

    @cached_property
    def _maps(self) -> list[npt.NDArray[Any]]:
        return [np.memmap(path, dtype=self.dtype, mode="r") for path in self._shards]

    @cached_property
    def _documents(self) -> npt.NDArray[np.int64]:
        return np.memmap(self.folder / f"{self.split}-documents.bin", dtype="<i8", mode="r")

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return self._documents[:-1]

    def _check_sizes(self) -> None:
        expected = {self.folder / f"{self.split}-documents.bin": 8 * (self.num_documents + 1)}
        for index, path in enumerate(self._shards):
            tokens = min(self._shard_tokens, self.num_tokens - index * self._shard_tokens)
            expected[path] = tokens * self.dtype.itemsize
        for path, size in expected.items():
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise DataError(f"{path} {state}; prepare the data again with --overwrite")


def open_together(folders: Sequence[Path | str], split: Split) -> list[TokenShards]:
    """Open a split of several folders that must share one tokenizer; raises `DataError` if they do not."""
    opened = [TokenShards.open(folder, split) for folder in folders]
    for shards in opened[1:]:
        if shards.tokenizer_fingerprint != opened[0].tokenizer_fingerprint:
            raise DataError(
                f"{opened[0].folder} and {shards.folder} were prepared with different tokenizers "
                f"({opened[0].tokenizer_fingerprint[:12]}, {shards.tokenizer_fingerprint[:12]}); prepare them with one"
            )
    return opened


def split_fingerprint(tokens: hashlib._Hash, documents: npt.NDArray[np.int64], tokenizer_fingerprint: str) -> str:
    """Hash of a split from the running hash of its token bytes; `documents` are the starts and the end, int64."""
    digest = hashlib.sha256(tokens.digest())
    digest.update(np.ascontiguousarray(documents, dtype="<i8").data)
    digest.update(tokenizer_fingerprint.encode())
    return digest.hexdigest()
