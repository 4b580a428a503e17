"""Headers of safetensors files: what is read equals what safetensors wrote, and lies are named."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trine.engine.inspect.headers import BITS, read_header

TENSORS = {
    "a": torch.zeros(3, 5),
    "b": torch.zeros(7, dtype=torch.bfloat16),
    "c": torch.zeros(2, 2, dtype=torch.int8),
    "d": torch.zeros(0, 4),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def edit(path: Path, **changes: Any) -> None:
    """Change entries of the header; the data stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, change in changes.items():
        header[name] = {**header.get(name, {}), **change}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_sound_file_is_read_as_it_was_written(written: Path) -> None:
    found = read_header(written)
    assert found.problems == []
    assert found.num_bytes == written.stat().st_size
    assert found.tensors == {"a": ("F32", 60), "b": ("BF16", 14), "c": ("I8", 4), "d": ("F32", 0)}


def test_widths_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    dtypes = {
        "F64": torch.float64, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool,
        "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    }  # fmt: skip
    path = tmp_path / "all.safetensors"
    save_file({name: torch.zeros(6, dtype=dtype) for name, dtype in dtypes.items()}, path)
    found = read_header(path)
    assert found.problems == []
    assert found.tensors == {name: (name, 6 * BITS[name] // 8) for name in dtypes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"a": {"shape": [3, 6]}}, "'a' has 60 bytes, not the 72 of F32 [3, 6]"),
        ({"a": {"dtype": "F65"}}, "'a' has dtype 'F65'"),
        ({"a": {"shape": [-3, -5]}}, "'a' has dtype 'F32', shape [-3, -5]"),
        ({"a": {"shape": [3.0, 5]}}, "shape [3.0, 5]"),
        ({"a": {"shape": None}}, "'a' has no dtype, shape and data_offsets"),
        ({"z": {"dtype": "F32"}}, "'z' has no dtype, shape and data_offsets"),
        ({"z": {"dtype": "F32", "shape": [2**40], "data_offsets": [78, 78 + 2**42]}}, "is truncated"),
        ({"z": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "where byte"),
    ],
)
def test_lies_are_named(written: Path, changes: dict[str, Any], expected: str) -> None:
    edit(written, **changes)
    assert any(expected in problem for problem in read_header(written).problems)


def test_every_truncation_is_seen(written: Path) -> None:
    content = written.read_bytes()
    for length in range(len(content)):
        written.write_bytes(content[:length])
        assert read_header(written).problems, length
    written.write_bytes(content + b"more")
    assert read_header(written).problems == [
        "model.safetensors has 4 bytes behind its last tensor; copy it again",
    ]


def test_what_is_no_header_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\xff" * 64, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"{{{{", b"PK\3\4" * 9):
        path.write_bytes(content)
        found = read_header(path)
        assert len(found.problems) == 1
        assert found.tensors == {}
    assert read_header(tmp_path / "none").problems == ["none cannot be read: No such file or directory"]
