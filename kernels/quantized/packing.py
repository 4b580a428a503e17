"""Weights of 4 or 8 bits in the layout that the kernels read, made once when a model is loaded.

A weight [N, K] is codes q (signed integers), scales and, where it is asymmetric, zero points (signed integers), one of
each for a row (channel) or for every 32, 64 or 128 numbers of a row (group):

    w[n, k] = (q[n, k] - z[n, k // group]) * s[n, k // group]

`pack` takes these plain tensors, so that a reader of an on-disk format has only to produce them; `unpack` gives them
back exactly.

The layout "tiles", for GPUs: int32 words [B, N, 16]. Block b of row n is the 64 bytes words[b, n]: 128 codes of 4 bits
or 64 of 8, so that what a program reads of one block, for any number of rows, is one piece of memory. Code k of a block
lies in word (k % 32) // 2 as two's complement, its lowest bit at

    bits * (k // 32) + 16 * (k % 2)

A mask over a word so takes out two neighbours, one in each half, which are two fp16 or bf16 numbers after one more
operation (`decode.py`); and one such mask over the 16 words is 32 consecutive numbers of the row, a part of one group.
K is filled up with zeros to whole blocks. Scales and zero points are [G, N].

The layout "lanes", for CPUs: `kernels/cpu/codes.py` (`lanes`; `words` are those of it).

The layout "rows", for CPUs without Numba: 8 bits int8 [N, K]; 4 bits uint8 [N, ceil(K / 2)], even k in the low half,
in two's complement. `decode` holds besides what torch's kernel for few rows wants of 4 bits.

Shapes: N output features, K input features, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trine.kernels.cpu.codes import LANES, LanesWeight, from_lanes, join_lanes, lanes_of_words, to_lanes
from trine.kernels.cpu.compiled import available
from trine.kernels.launch import ceil_div
from trine.kernels.target import on_device, uses_triton

# Words of a row in one block, and the numbers of the row that one shift of these words takes out.
WORDS = 16
SLICE = 32
GROUP_SIZES = (32, 64, 128)
BITS = (4, 8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedWeight:
    """A weight made by `pack`. `scales` [G, N]; `zeros` int8 [G, N] or None; the other tensors: see above."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    decode: tuple[Tensor, ...] | None
    bits: int
    width: int
    layout: str
    lanes: LanesWeight | None = None

    @property
    def num_features(self) -> int:
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        """Numbers of a row that share a scale; the width where all do."""
        return self.width // max(1, self.scales.shape[0])

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def num_bytes(self) -> int:
        """What the weight holds in memory."""
        tensors = [self.words, self.scales, self.zeros, *(self.decode or ())]
        if self.lanes is not None:
            tensors += [self.lanes.scales, self.lanes.zeros]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """On another device, in the layout of that device."""
        if on_device(self.device, device):
            return self
        values, scales, zeros = unpack(self)
        return pack(values.to(device), scales.to(device), None if zeros is None else zeros.to(device), bits=self.bits)


def block_size(bits: int) -> int:
    """Numbers of a row in one block of the layout "tiles"."""
    return WORDS * 32 // bits


def pack(values_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None = None, *, bits: int) -> PackedWeight:
    """The packed weight of int8 codes [N, K] in -2^(bits-1) .. 2^(bits-1) - 1, on the device of the codes.

    Scales float [N, G] with G = 1 (channel) or K / 32, K / 64, K / 128; zero points int8 [N, G], of 4 bits in -8 .. 8.
    Raises ValueError for anything else.
    """
    _check(values_NK, scales_NG, zeros_NG, bits)
    scales_GN = scales_NG.t().contiguous()
    zeros_GN = None if zeros_NG is None else zeros_NG.t().contiguous()
    width = values_NK.shape[1]
    if uses_triton(values_NK) or values_NK.is_meta:
        return PackedWeight(_to_tiles(values_NK, bits), scales_GN, zeros_GN, None, bits, width, "tiles")
    if available():
        lanes = to_lanes(values_NK, scales_NG, zeros_NG, bits)
        return PackedWeight(lanes.words, scales_GN, zeros_GN, None, bits, width, "lanes", lanes)
    weight = PackedWeight(_to_rows(values_NK, bits), scales_GN, zeros_GN, None, bits, width, "rows")
    return replace(weight, decode=_for_few_rows(values_NK, weight))


def pack_words(
    words_NX: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None = None, *, bits: int, width: int
) -> PackedWeight | None:
    """`pack` of codes in int32 words, as `lanes_of_words` takes them, twenty times as fast; None where it cannot be."""
    _check_scales(words_NX.shape[0], width, scales_NG, zeros_NG, bits)
    if uses_triton(words_NX) or words_NX.is_meta or not available():
        return None
    lanes = lanes_of_words(words_NX, scales_NG, zeros_NG, bits, width)
    if lanes is None:
        return None
    scales_GN = scales_NG.t().contiguous()
    zeros_GN = None if zeros_NG is None else zeros_NG.t().contiguous()
    return PackedWeight(lanes.words, scales_GN, zeros_GN, None, bits, width, "lanes", lanes)


def can_join(weights: Sequence[PackedWeight]) -> bool:
    """Whether `join` takes them: layout "lanes", alike in all but their outputs, of which there are whole tiles."""
    kinds = {
        (one.bits, one.width, one.scales.shape[0], one.scales.dtype, one.zeros is None, one.layout) for one in weights
    }
    return len(kinds) == 1 and weights[0].lanes is not None and all(one.num_features % LANES == 0 for one in weights)


def join(weights: Sequence[PackedWeight]) -> tuple[PackedWeight, list[PackedWeight]]:
    """The outputs of several weights as those of one, and the weights again, which then share its memory."""
    assert can_join(weights)
    first = weights[0]
    whole, parts = join_lanes([one.lanes for one in weights if one.lanes is not None])
    scales = torch.cat([one.scales for one in weights], dim=1)
    zeros = None if first.zeros is None else torch.cat([one.zeros for one in weights if one.zeros is not None], dim=1)
    joined = replace(first, words=whole.words, scales=scales, zeros=zeros, lanes=whole)
    return joined, [replace(one, words=part.words, lanes=part) for one, part in zip(weights, parts, strict=True)]


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values_NK, scales_NG, zeros_NG) as `pack` got them."""
    if weight.lanes is not None:
        return from_lanes(weight.lanes)
    values_NK = (_from_tiles if weight.layout == "tiles" else _from_rows)(weight)
    zeros = weight.zeros
    return values_NK, weight.scales.t().contiguous(), None if zeros is None else zeros.t().contiguous()


def _check(values_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    if values_NK.dim() != 2 or values_NK.dtype != torch.int8 or values_NK.shape[1] == 0:
        raise ValueError(f"values are {values_NK.dtype} {tuple(values_NK.shape)}; expected int8 [N, K], K positive")
    _check_scales(len(values_NK), values_NK.shape[1], scales_NG, zeros_NG, bits)
    if bits == 4 and values_NK.numel() and not values_NK.is_meta:
        low, high = values_NK.aminmax()
        if int(low) < -8 or int(high) > 7:
            raise ValueError("values of 4 bits must be in -8 .. 7; store unsigned codes minus 8")


def _check_scales(num_features: int, width: int, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int) -> None:
    if scales_NG.dtype not in SCALE_DTYPES or scales_NG.dim() != 2 or scales_NG.shape[0] != num_features:
        raise ValueError(
            f"scales are {scales_NG.dtype} {tuple(scales_NG.shape)}; expected float32, bfloat16 or float16 "
            f"[{num_features}, G]"
        )
    if scales_NG.requires_grad:
        raise ValueError("scales require a gradient, which a packed weight has not; give scales.detach()")
    groups = scales_NG.shape[1]
    if groups != 1 and not (groups and width % groups == 0 and width // groups in GROUP_SIZES):
        raise ValueError(
            f"scales have {groups} groups for {width} columns; expected 1, or groups of 32, 64 or 128 that fill a row"
        )
    if zeros_NG is not None and (zeros_NG.dtype != torch.int8 or zeros_NG.shape != scales_NG.shape):
        raise ValueError(
            f"zeros are {zeros_NG.dtype} {tuple(zeros_NG.shape)}; expected int8 {tuple(scales_NG.shape)}, as the scales"
        )
    if bits == 4 and zeros_NG is not None and not zeros_NG.is_meta and bool(((zeros_NG < -8) | (zeros_NG > 8)).any()):
        raise ValueError("zeros of 4 bits must be in -8 .. 8; store unsigned zero points minus 8")


def _places(bits: int) -> list[tuple[int, int, int]]:
    """(slice, half of the word, lowest bit) of every code of a word."""
    return [(s, half, bits * s + 16 * half) for s in range(16 // bits) for half in (0, 1)]


def _to_tiles(values_NK: Tensor, bits: int) -> Tensor:
    num_features, width = values_NK.shape
    blocks = ceil_div(width, block_size(bits))
    padded = torch.nn.functional.pad(values_NK, (0, blocks * block_size(bits) - width))
    codes = padded.view(num_features, blocks, 16 // bits, WORDS, 2)
    words = torch.zeros(num_features, blocks, WORDS, dtype=torch.int32, device=values_NK.device)
    for s, half, shift in _places(bits):
        words |= (codes[:, :, s, :, half].to(torch.int32) & ((1 << bits) - 1)) << shift
    return words.transpose(0, 1).contiguous()


def _from_tiles(weight: PackedWeight) -> Tensor:
    bits = weight.bits
    blocks, num_features, _ = weight.words.shape
    codes = torch.empty(num_features, blocks, 16 // bits, WORDS, 2, dtype=torch.int8, device=weight.words.device)
    words = weight.words.transpose(0, 1)
    for s, half, shift in _places(bits):
        codes[:, :, s, :, half] = ((words << (32 - bits - shift)) >> (32 - bits)).to(torch.int8)
    return codes.view(num_features, blocks * block_size(bits))[:, : weight.width].contiguous()


# --- CPU --------------------------------------------------------------------------------------------------------------


def _to_rows(values_NK: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return values_NK.clone(memory_format=torch.contiguous_format)
    padded = torch.nn.functional.pad(values_NK, (0, values_NK.shape[1] % 2))
    return (padded[:, ::2] & 15 | padded[:, 1::2] << 4).view(torch.uint8)


def _from_rows(weight: PackedWeight) -> Tensor:
    if weight.bits == 8:
        return weight.words.clone()
    words = weight.words.view(torch.int8)
    values = torch.stack((words << 4 >> 4, words >> 4), dim=-1).flatten(1)
    return values[:, : weight.width].contiguous()


def _for_few_rows(values_NK: Tensor, weight: PackedWeight) -> tuple[Tensor, ...] | None:
    """(codes, (scale, zero) [G, N, 2], rest [N, G]) of torch's product of few bf16 rows with 4 bits; None if it cannot.

    That product takes bf16 scales, and what is added instead of a zero point subtracted: -z s in bf16. What this misses
    of the product is the rest (left out where there are no zero points), to be added as sums of x times it. One scale a
    row is written as one for each group.
    """
    num_features, width = values_NK.shape
    fitting = (weight.group_size, 128, 64, 32)
    size = next((g for g in fitting if g in GROUP_SIZES and width % g == 0), 0)
    if weight.bits != 4 or not size or num_features % 16 or not num_features:
        return None
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values_NK.to(torch.int32) + 8, 1)
    scales_GN = weight.scales.bfloat16().expand(width // size, num_features)
    if weight.zeros is None:
        return codes, torch.stack((scales_GN, torch.zeros_like(scales_GN)), dim=-1)
    added_GN = -weight.zeros.float() * scales_GN.float()
    rest_NG = (added_GN - added_GN.bfloat16().float()).bfloat16().t().contiguous()
    return codes, torch.stack((scales_GN, added_GN.bfloat16()), dim=-1), rest_NG
