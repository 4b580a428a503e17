"""The block types of GGUF files: bytes of rows to the numbers they stand for, in fp32.

A row of K numbers is K / size blocks, one after the other; d and m are fp16, i counts the numbers of a block:

    Q8_0   32 numbers, 34 bytes   d, int8 q                                   w = d q
    Q4_0   32, 18                 d, nibbles                                  w = d (q - 8)
    Q4_1   32, 20                 d, m, nibbles                               w = d q + m
    Q5_0   32, 22                 d, 32 high bits, nibbles                    w = d (q - 16)
    Q5_1   32, 24                 d, m, 32 high bits, nibbles                 w = d q + m
    Q4_K   256, 144               d, m, 12 bytes of 6-bit s and t, nibbles    w = d s[i / 32] q - m t[i / 32]
    Q5_K   256, 176               the same, and 32 bytes of high bits before the nibbles
    Q6_K   256, 210               128 bytes of low 4 bits, 64 of high 2 bits, int8 s[16], d    w = d s[i / 16] (q - 32)

Nibbles: in blocks of 32 the low halves of 16 bytes are the first 16 numbers, the high halves the last; in blocks of 256
the low halves of each 32 bytes are 32 numbers, the high halves the next 32.

Q8_0 and Q4_0 are codes with one scale for 32 numbers, which our kernels multiply as they are (`as_codes`).
Source: the layout of ggml, as its Python package `gguf` decodes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor


@dataclass(frozen=True)
class BlockType:
    """`size` numbers in `num_bytes`. `decode`: uint8 [blocks, num_bytes] to fp32 [blocks, size]."""

    name: str
    size: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor]


def as_codes(kind: BlockType, blocks: Tensor, num_features: int, width: int) -> QuantizedTensor | None:
    """The weight [N, K] of blocks uint8 [N K / 32, bytes] as codes and scales; None unless it is Q8_0 or Q4_0."""
    codes = {"Q8_0": _q8_0_codes, "Q4_0": _q4_0_codes}.get(kind.name)
    if codes is None:
        return None
    bits = 8 if kind.name == "Q8_0" else 4
    scheme = Scheme(bits=bits, strategy="group", group_size=kind.size)
    scales = _half(blocks, 0).view(num_features, -1)
    return QuantizedTensor(scheme, codes(blocks).view(num_features, width), scales)


def _half(blocks: Tensor, place: int) -> Tensor:
    """The fp16 number at a place of each block, [blocks, 1]."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves, then high halves, of the last dimension."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(words: Tensor, count: int) -> Tensor:
    """The bits of little-endian bytes, the lowest first, uint8 [blocks, count]."""
    return (words[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, :count]


def _q8_0_codes(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8)


def _q4_0_codes(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).to(torch.int8) - 8


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0).float() * _q8_0_codes(blocks).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0).float() * _q4_0_codes(blocks).float()


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0).float() * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2).float()


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6], 32) << 4
    return _half(blocks, 0).float() * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8], 32) << 4
    return _half(blocks, 0).float() * codes.float() + _half(blocks, 2).float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _nibbles(blocks[:, 16:].reshape(len(blocks), 4, 32)).view(len(blocks), 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(len(blocks), 4, 32)).view(len(blocks), 8, 32)
    # Byte j of the high bits holds those of number j of all 8 groups, the first lowest.
    high = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _with_minima(blocks, low | high << 4)


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Codes [blocks, 8, 32] of Q4_K and Q5_K times their scales, less their minima."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    factor = _half(blocks, 0).float() * scales.float()
    offset = _half(blocks, 2).float() * minima.float()
    return (factor[..., None] * codes.float() - offset[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    codes = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    codes = codes | (high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208).float()
    return (scales[..., None] * (codes.view(-1, 16, 16).float() - 32)).flatten(1)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 32, 18, _q4_0),
        BlockType("Q4_1", 32, 20, _q4_1),
        BlockType("Q5_0", 32, 22, _q5_0),
        BlockType("Q5_1", 32, 24, _q5_1),
        BlockType("Q8_0", 32, 34, _q8_0),
        BlockType("Q4_K", 256, 144, _q4_k),
        BlockType("Q5_K", 256, 176, _q5_k),
        BlockType("Q6_K", 256, 210, _q6_k),
    )
}
