"""Codes of 4 and 8 bits packed into int32 words, as the format `pack-quantized` stores them.

A code q is stored as the unsigned number q + 2^(bits - 1). Number i of a row lies at bit `bits * i` of it, counted from
the lowest bit of the first word; a row is filled up with zero bits to whole words. On a little-endian machine these are
bytes in their order, two codes of 4 bits in each, the first in the low half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def num_words(width: int, bits: int) -> int:
    """Words of a row of so many codes."""
    return -(-width * bits // 32)


def pack_words(codes_NK: Tensor, bits: int) -> Tensor:
    """int32 [N, words] of int8 codes [N, K]."""
    # Bytes wrap around, so that adding 2^(bits - 1) to a code gives its unsigned number in place.
    unsigned = codes_NK.contiguous().view(torch.uint8) + 2 ** (bits - 1)
    padded = F.pad(unsigned, (0, -codes_NK.shape[1] % (32 // bits)))
    bytes_NB = padded[:, ::2] | padded[:, 1::2] << 4 if bits == 4 else padded
    # Flat, because a single column may have strides that a view of other numbers refuses.
    words: Tensor = bytes_NB.flatten().view(torch.int32).view(len(codes_NK), -1)
    return words


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """int8 codes [N, K] of int32 words [N, words]."""
    bytes_NB = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 4:
        unsigned = torch.empty(*bytes_NB.shape, 2, dtype=torch.uint8, device=words.device)
        torch.bitwise_and(bytes_NB, 15, out=unsigned[..., 0])
        torch.bitwise_right_shift(bytes_NB, 4, out=unsigned[..., 1])
        bytes_NB = unsigned.flatten(1)
    codes: Tensor = (bytes_NB[:, :width] - 2 ** (bits - 1)).view(torch.int8)
    return codes
