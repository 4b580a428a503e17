"""Codes in int32 words: the bits that the format describes, and back."""

from __future__ import annotations

import pytest
import torch

from trine.engine.model.quantized.words import num_words, pack_words, unpack_words


def test_first_code_lies_in_the_lowest_bits() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    assert [word & 0xFFFFFFFF for word in pack_words(codes, 4)[0].tolist()] == [0x76543210, 0xFEDCBA98]
    codes = torch.tensor([[-128, -127, 0, 127]], dtype=torch.int8)
    assert pack_words(codes, 8)[0].tolist()[0] & 0xFFFFFFFF == 0xFF800100


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 5, 32, 123])
def test_codes_come_back(bits: int, width: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (3, width), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, num_words(width, bits))
    assert torch.equal(unpack_words(words, bits, width), codes)


def test_transposed_words_are_read() -> None:
    codes = torch.randint(-8, 8, (16, 24), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(unpack_words(pack_words(codes, 4).t().contiguous().t(), 4, 24), codes)
