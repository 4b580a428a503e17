"""Blocks of GGUF files against the package gguf: the same numbers to the bit, for any bytes."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from trine.engine.model.quantized.gguf_blocks import BLOCK_TYPES, as_codes

# Where a block holds fp16 numbers, which are to be finite.
_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def _blocks(name: str, count: int) -> Any:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, BLOCK_TYPES[name].num_bytes), dtype=np.uint8)
    for place in _HALVES.get(name, (0,)):
        blocks[:, place : place + 2] = rng.normal(size=count).astype(np.float16)[:, None].view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", list(BLOCK_TYPES))
def test_numbers_are_those_of_the_package(name: str) -> None:
    kind = BLOCK_TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.size, kind.num_bytes)
    blocks = _blocks(name, 64)
    assert np.array_equal(kind.decode(torch.from_numpy(blocks)).numpy(), dequantize(blocks, theirs))
    assert kind.decode(torch.from_numpy(blocks[:0])).shape == (0, kind.size)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_codes_stand_for_the_same_numbers(name: str) -> None:
    w_NK = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    theirs = gguf.GGMLQuantizationType[name]
    blocks = quantize(w_NK, theirs)
    kind = BLOCK_TYPES[name]
    codes = as_codes(kind, torch.from_numpy(blocks).view(-1, kind.num_bytes), 5, 96)
    assert codes is not None
    assert (codes.scheme.bits, codes.scheme.group_size) == (8 if name == "Q8_0" else 4, 32)
    assert np.array_equal(codes.dequantize(torch.float32).numpy(), dequantize(blocks, theirs))


def test_other_blocks_are_no_codes() -> None:
    assert as_codes(BLOCK_TYPES["Q6_K"], torch.from_numpy(_blocks("Q6_K", 4)), 4, 256) is None
