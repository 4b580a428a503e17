"""GGUF files: what the package gguf writes is read; headers that lie are refused before memory is taken."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize

from trine.engine.errors import CheckpointError
from trine.engine.model.gguf import GgufFile, read_gguf

METADATA: dict[str, Any] = {
    "llama.block_count": 3,
    "llama.rope.freq_base": 10000.0,
    "general.name": "tiny \u2603",
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "a", "\u0120b"],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.25],
    "tokenizer.ggml.token_type": [3, 1, 1],
}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def write(path: Path) -> dict[str, Any]:
    """A file with every kind of value and tensor that the package writes; the numbers of its tensors in fp32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(10000.0)
    writer.add_name(METADATA["general.name"])
    writer.add_add_bos_token(True)
    writer.add_token_list(METADATA["tokenizer.ggml.tokens"])
    writer.add_token_scores(METADATA["tokenizer.ggml.scores"])
    writer.add_token_types(METADATA["tokenizer.ggml.token_type"])
    rng, expected = np.random.default_rng(0), {}
    for name in KINDS:
        kind = gguf.GGMLQuantizationType[name]
        w_NK = rng.normal(size=(5, 64)).astype(np.float32)
        blocks = w_NK if name == "F32" else w_NK.astype(np.float16) if name == "F16" else quantize(w_NK, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        expected[f"{name}.weight"] = gguf.dequantize(blocks, kind)
    writer.add_tensor("norm.weight", np.arange(7, dtype=np.float32))
    expected["norm.weight"] = np.arange(7, dtype=np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_metadata_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    expected = write(tmp_path / "a.gguf")
    file = read_gguf(tmp_path / "a.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert file.tensors.keys() == expected.keys()
    for name, numbers in expected.items():
        tensor = file.tensors[name]
        assert tensor.shape == numbers.shape
        assert np.array_equal(tensor.read().float().numpy(), numbers), name
        codes = tensor.read_codes()
        assert (codes is not None) == (tensor.kind in ("Q8_0", "Q4_0"))
        if codes is not None:
            assert np.array_equal(codes.dequantize(torch.float32).numpy(), numbers)


# --- files that lie ---------------------------------------------------------------------------------------------------


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _file(entries: bytes = b"", infos: bytes = b"", *, tensors: int = 0, kvs: int = 0, data: bytes = b"") -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, kvs) + entries + infos
    return header + b"\0" * (-len(header) % 32) + data


def _info(name: bytes = b"a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends within"),
    "magic": (b"GGML" + b"\0" * 40, "no GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "tensor count": (_file(tensors=2**63), "announces 9223372036854775808"),
    "entry count": (_file(kvs=2**40), "announces 1099511627776"),
    "key length": (_file(struct.pack("<Q", 2**62) + b"abc" * 9, kvs=1), "announces 4611686018427387904"),
    "string length": (_file(_string(b"k") + struct.pack("<IQ", 8, 2**33), kvs=1), "announces 8589934592"),
    "array count": (_file(_string(b"k") + struct.pack("<IIQ", 9, 4, 2**61), kvs=1), "announces"),
    "value type": (_file(_string(b"k") + struct.pack("<IQ", 13, 0), kvs=1), "type 13"),
    "deep arrays": (_file(_string(b"k") + b"\x09\0\0\0" + struct.pack("<IQ", 9, 1) * 9, kvs=1), "arrays"),
    "key twice": (_file((_string(b"k") + struct.pack("<IB", 0, 1)) * 2, kvs=2), "twice"),
    "alignment": (_file(_string(b"general.alignment") + struct.pack("<II", 4, 3), kvs=1), "general.alignment 3"),
    "no alignment": (_file(_string(b"general.alignment") + struct.pack("<II", 4, 0), kvs=1), "general.alignment 0"),
    "dimensions": (_file(infos=_info(shape=(1,) * 5), tensors=1), "5 dimensions"),
    "no dimensions": (_file(infos=_info(shape=()) + b"\0" * 32, tensors=1), "0 dimensions"),
    "unread type": (_file(infos=_info(kind=10), tensors=1), "type Q2_K"),
    "unknown type": (_file(infos=_info(kind=999), tensors=1), "number 999"),
    "absurd shape": (_file(infos=_info(shape=(2**40, 2**40)), tensors=1, data=b"\0" * 128), "not within"),
    "empty shape": (_file(infos=_info(shape=(0,)), tensors=1), r"shape \[0\]"),
    "offset": (_file(infos=_info(offset=2**63), tensors=1, data=b"\0" * 128), "offset 9223372036854775808"),
    "crooked offset": (_file(infos=_info(offset=4), tensors=1, data=b"\0" * 160), "offset 4"),
    "end": (_file(infos=_info(), tensors=1, data=b"\0" * 127), "not within"),
    "half block": (_file(infos=_info(shape=(40,), kind=8), tensors=1, data=b"\0" * 128), "blocks of 32"),
    "name twice": (_file(infos=_info() * 2, tensors=2, data=b"\0" * 128), "twice"),
    "overlap": (_file(infos=_info(b"a") + _info(b"b"), tensors=2, data=b"\0" * 128), "over another"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LIES))
def test_headers_that_lie_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, words = LIES[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_gguf(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.gguf"):
        read_gguf(tmp_path / "no.gguf")


_SIZES = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def _mutations(content: bytes, header: int, count: int) -> Iterator[bytes]:
    """The file with a few bytes of its header changed, cut, or repeated."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(0, header))
            kind = rng.integers(0, 5)
            if kind == 0:
                changed[place : place + 1] = bytes([int(rng.integers(0, 256))])
            elif kind == 1:
                changed[place : place + 8] = struct.pack("<Q", _SIZES[int(rng.integers(0, len(_SIZES)))])
            elif kind == 2:
                del changed[place : place + int(rng.integers(1, 16))]
            elif kind == 3:
                changed[place:place] = changed[place : place + int(rng.integers(1, 64))]
            else:
                changed = changed[: int(rng.integers(0, len(changed)))]
        yield bytes(changed)


def _fuzz(folder: Path, count: int) -> None:
    write(folder / "a.gguf")
    content = (folder / "a.gguf").read_bytes()
    header = min(tensor.start for tensor in read_gguf(folder / "a.gguf").tensors.values())
    errors = []
    for number, mutation in enumerate(_mutations(content, header, count)):
        (folder / "b.gguf").write_bytes(mutation)
        try:
            file: GgufFile | None = read_gguf(folder / "b.gguf")
        except CheckpointError as error:
            errors.append(str(error))
            continue
        assert file is not None
        for tensor in list(file.tensors.values())[number % len(KINDS) :: len(KINDS)]:
            assert tensor.read().shape == tensor.shape
    assert count // 2 < len(errors) < count
    assert all(error.isprintable() for error in errors)


def test_damaged_headers_are_refused_or_read(tmp_path: Path) -> None:
    _fuzz(tmp_path, 400)


@pytest.mark.slow
def test_many_damaged_headers_are_refused_or_read(tmp_path: Path) -> None:
    _fuzz(tmp_path, 10_000)
