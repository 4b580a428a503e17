"""Reading GGUF files, the format of llama.cpp: a header, metadata, and tensors that are read when asked for.

    "GGUF", u32 version, u64 tensors, u64 metadata entries
    each entry: key, u32 type, value                  a string is u64 length and bytes, an array u32 type, u64 count
    each tensor: name, u32 dimensions, u64 sizes (the innermost first), u32 type, u64 offset
    filled up to `general.alignment` (32), then the data, which offsets count from

Numbers are little-endian. The header is not believed: a length or count that the rest of the file cannot hold, an
offset or size outside the file, and a tensor of a type that is not known are refused before memory is taken for them.
Data is mapped, so that only what is read is in memory.

Source: the specification in ggml's documentation; blocks: `quantized/gguf_blocks.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.gguf_blocks import BLOCK_TYPES, as_codes
from trine.engine.model.quantized.tensor import QuantizedTensor

Value = int | float | bool | str | list["Value"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Types that stand in headers, whether or not they are read.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_MAX_DIMENSIONS, _MAX_ALIGNMENT, _MAX_DEPTH = 4, 2**20, 4
# Of anything that is counted: bytes of a string, elements of an array. Vocabularies have some 10^5 entries.
_MAX_COUNT = 2**24


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: `shape` with the outermost dimension first; bytes `start` .. `start + num_bytes`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """Its numbers: as stored for F32, F16, BF16 and F64, in fp32 for blocks."""
        if self.kind in _FLOATS:
            return self._bytes().view(_FLOATS[self.kind]).view(self.shape).clone()
        kind = BLOCK_TYPES[self.kind]
        return kind.decode(self._bytes().view(-1, kind.num_bytes)).view(self.shape)

    def read_codes(self) -> QuantizedTensor | None:
        """Codes and scales that stand for the same numbers, of a matrix in Q8_0 or Q4_0; None for others."""
        if len(self.shape) != 2 or self.kind not in BLOCK_TYPES:
            return None
        kind = BLOCK_TYPES[self.kind]
        return as_codes(kind, self._bytes().view(-1, kind.num_bytes), *self.shape)

    def _bytes(self) -> Tensor:
        """uint8, a copy, so that it has the alignment that other dtypes want."""
        end = self.start + self.num_bytes
        return torch.from_file(str(self.path), shared=False, size=end, dtype=torch.uint8)[self.start :].clone()


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was read and checked."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header. Raises `CheckpointError` saying what is wrong, and where in the file."""
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


class _Header:
    """Reads a header from its beginning; `self.at` bytes of `self.size` were read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size, self.at = file.seek(0, 2), 0
        file.seek(0)

    def read(self) -> GgufFile:
        """The file of this header."""
        magic = self.take(4, "the magic number")
        if magic != _MAGIC:
            raise CheckpointError(f"{self.path} begins with {magic!r}, not {_MAGIC!r}: it is no GGUF file")
        version = int(self.number("I"))
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path} has GGUF version {version}; Trine reads {' and '.join(map(str, _VERSIONS))}"
            )
        num_tensors = self.count("tensors", least_bytes=8 + 4 + 8 + 4 + 8)
        num_entries = self.count("metadata entries", least_bytes=8 + 4 + 1)
        metadata: dict[str, Value] = {}
        for _ in range(num_entries):
            key = self.string("a key of the metadata")
            if key in metadata:
                raise self.damaged(f"names {key!r} twice in its metadata")
            metadata[key] = self.value(int(self.number("I")), key)
        infos = [self.info() for _ in range(num_tensors)]
        return GgufFile(self.path, metadata, self.placed(infos, metadata))

    def info(self) -> tuple[str, tuple[int, ...], str, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.string("the name of a tensor")
        dimensions = int(self.number("I"))
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.damaged(f"gives {name!r} {dimensions} dimensions; there are 1 to {_MAX_DIMENSIONS}")
        shape = tuple(int(self.number("Q")) for _ in range(dimensions))[::-1]
        number, offset = int(self.number("I")), int(self.number("Q"))
        kind = _TYPE_NAMES.get(number, f"number {number}")
        if kind not in _FLOATS and kind not in BLOCK_TYPES:
            known = ", ".join((*_FLOATS, *BLOCK_TYPES))
            raise CheckpointError(f"{self.path} stores {name!r} in type {kind}; Trine reads {known}")
        return name, shape, kind, offset

    def placed(
        self, infos: list[tuple[str, tuple[int, ...], str, int]], metadata: Mapping[str, Value]
    ) -> dict[str, GgufTensor]:
        """The tensors by name, each within the file and none over another."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.damaged(f"has general.alignment {alignment!r}; it must be a power of two")
        begin = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            size, num_bytes = 1, _FLOATS[kind].itemsize if kind in _FLOATS else 0
            if kind in BLOCK_TYPES:
                size, num_bytes = BLOCK_TYPES[kind].size, BLOCK_TYPES[kind].num_bytes
            if name in found or 0 in shape or shape[-1] % size:
                why = "stands there twice" if name in found else f"has rows that blocks of {size} do not fill"
                raise self.damaged(f"has a tensor {name!r} of shape {list(shape)} in {kind} that {why}")
            total = prod(shape) // size * num_bytes
            if offset % alignment or begin + offset + total > self.size:
                raise self.damaged(
                    f"puts {name!r} of {total} bytes at offset {offset}, which is not within its {self.size} bytes"
                )
            found[name] = GgufTensor(self.path, name, shape, kind, begin + offset, total)
        end = begin
        for tensor in sorted(found.values(), key=lambda one: one.start):
            if tensor.start < end:
                raise self.damaged(f"puts {tensor.name!r} over another tensor")
            end = tensor.start + tensor.num_bytes
        return found

    # --- parts --------------------------------------------------------------------------------------------------------

    def value(self, kind: int, key: str, depth: int = 0) -> Value:
        """A value of the metadata."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise self.damaged(f"has a value of type {kind} for {key!r}; types are 0 to 12, arrays {_MAX_DEPTH} deep")
        each = int(self.number("I"))
        if each in _NUMBERS:
            form = _NUMBERS[each]
            count = self.count(key, least_bytes=struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form), key)))
        least = 8 if each == _STRING else 12
        return [self.value(each, key, depth + 1) for _ in range(self.count(key, least_bytes=least))]

    def string(self, what: str) -> str:
        """A string."""
        length = self.count(what, least_bytes=1)
        # Vocabularies hold tokens that are parts of characters; as in llama.cpp, the bytes are what counts.
        return self.take(length, what).decode("utf-8", errors="surrogateescape")

    def count(self, what: str, *, least_bytes: int) -> int:
        """A count of things that take at least so many bytes each; refused where what is to come cannot hold them."""
        count = int(self.number("Q"))
        if count > _MAX_COUNT or count * least_bytes > self.size - self.at:
            raise self.damaged(f"announces {count} for {what!r}, with {self.size - self.at} bytes to come")
        return count

    def number(self, form: str) -> int | float | bool:
        """A number of one of `struct`'s forms."""
        found: int | float | bool = struct.unpack(f"<{form}", self.take(struct.calcsize(form), "a number"))[0]
        return found

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        found = b"" if count > self.size - self.at else self.file.read(count)
        if len(found) != count:
            raise self.damaged(f"ends within {what!r}")
        self.at += count
        return found

    def damaged(self, what: str) -> CheckpointError:
        """An error with the place in the file."""
        return CheckpointError(f"{self.path} is damaged: byte {self.at}: it {what}; copy it again")
