"""The headers of safetensors files, read without believing them: what each says, and everything that cannot be so.

    u64 length of the header, the header as JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, the data

Unlike the loader, which refuses a file at the first thing that is wrong, this goes on, so that the rest of a damaged
checkpoint can still be described. Nothing of the data is read.

Source: the format's description in the safetensors repository.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

# Bits of a number, by safetensors' names.
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "I64": 64,
    "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
_LONGEST = 100_000_000  # bytes of a header, as in safetensors itself
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says: dtype and bytes of each tensor by name. `problems`: what is wrong with it, a line each."""

    path: Path
    num_bytes: int
    tensors: dict[str, tuple[str, int]]
    problems: list[str]


def read_header(path: Path) -> Header:
    """The header of a file; a file that cannot be read, or is none, has problems and no tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if length > min(size - 8, _LONGEST):
                what = f"{path.name} announces a header of {length:,} bytes and has {size:,} in all: it is truncated"
                return Header(path, size, {}, [f"{what}, or no safetensors file; copy it again"])
            entries = json.loads(file.read(length))
    except OSError as error:
        return Header(path, 0, {}, [f"{path.name} cannot be read: {error.strerror or error}"])
    except (ValueError, RecursionError) as error:
        return Header(path, size, {}, [f"{path.name} has a header that is no JSON ({error}); copy it again"])
    if not isinstance(entries, dict):
        return Header(path, size, {}, [f"{path.name} has a header that is no JSON object; copy it again"])
    entries.pop("__metadata__", None)
    return _checked(path, size, size - 8 - length, entries)


def _checked(path: Path, size: int, data: int, entries: dict[str, Any]) -> Header:
    tensors: dict[str, tuple[str, int]] = {}
    places: list[tuple[int, int, str]] = []
    lies: list[str] = []
    for name, entry in entries.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError):
            lies.append(f"{name!r} has no dtype, shape and data_offsets")
            continue
        if kind not in BITS or any(type(number) is not int or number < 0 for number in numbers):
            lies.append(f"{name!r} has dtype {kind!r}, shape {shape} and data_offsets {begin}, {end}")
            continue
        wanted = -(-prod(shape) * BITS[kind] // 8)
        if end - begin != wanted:
            lies.append(f"{name!r} has {end - begin:,} bytes, not the {wanted:,} of {kind} {shape}")
        else:
            tensors[name] = kind, wanted
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            lies.append(f"{name!r} begins at byte {begin:,} of the data, where byte {at:,} is next")
        at = max(at, end)
    problems = [f"{path.name} has a header that lies: {_some(lies)}; copy it again"] if lies else []
    if at > data:
        problems.append(f"{path.name} is truncated: {at - data:,} of {at:,} bytes of its tensors are missing")
    elif at < data:
        problems.append(f"{path.name} has {data - at:,} bytes behind its last tensor; copy it again")
    return Header(path, size, tensors, problems)


def _some(lies: list[str]) -> str:
    more = f" and {len(lies) - _SHOWN} more" if len(lies) > _SHOWN else ""
    return ", ".join(lies[:_SHOWN]) + more
