"""Weights of 4- and 8-bit codes for the compiled loops: their layout, products of few rows, dequantizing.

    w[n, k] = (q[n, k] - z[n, k // group]) s[n, k // group]

The layout "lanes": int32 words [T, K / c, 16], c = 32 / bits codes of a word. Tile t holds the outputs 16 t to
16 t + 15, side by side; a word holds c neighbours along K in two's complement, the first in its lowest bits. N and K
are filled up with zeros to whole tiles and chunks. Scales and zero points lie as [T, G, 16].

Shapes: M rows, K inputs, N outputs, G groups. Bytes: N K bits / 8 and those of scales and zeros; 2 M N K FLOPs. Sums
are fp32 and results are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.compiled import array, single, use_torch_threads

LANES = 16
# Numbers of a row whose products are summed before the scale comes in; a group is one of these.
CHUNKS = (128, 64, 32)
# Numbers dequantized at a time: 2 MiB in bf16.
_PIECE_NUMBERS = 2**20


@dataclass(frozen=True)
class LanesWeight:
    """A weight made by `to_lanes`."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    num_features: int
    width: int
    groups: int

    @cached_property
    def chunk(self) -> int:
        """Numbers of a chunk: a group, or a part of the one that is a row."""
        return chunk_of(self.width, self.groups)

    @cached_property
    def arguments(self) -> tuple[Any, tuple[int, ...]]:
        """`weight` and `shifts` as the loops take them (`codes_loops.py`)."""
        shifts = tuple(range(0, 32, self.bits))
        chunks = self.words.shape[1] * len(shifts) // self.chunk
        shape = (self.num_features, self.width, self.chunk // len(shifts), chunks // self.groups)
        # Numba takes fp16 as int16 and bf16 as uint16.
        scales = self.scales.view(torch.int16) if self.scales.dtype == torch.float16 else self.scales
        zeros = np.empty(0, np.int8) if self.zeros is None else array(self.zeros).ravel()
        return (array(self.words).ravel(), array(scales).ravel(), zeros, shape), shifts


def chunk_of(width: int, groups: int) -> int:
    """The numbers of a chunk, for groups of 32, 64 or 128, or one."""
    return width // groups if groups > 1 else next((chunk for chunk in CHUNKS if width % chunk == 0), CHUNKS[-1])


def to_lanes(values_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int) -> LanesWeight:
    """The weight of int8 codes [N, K]; scales fp32, bf16 or fp16 [N, G], zero points int8 [N, G].

    G is 1 or the number of groups of 32, 64 or 128 that fill a row (`quantized.packing.pack` checks it).
    """
    num_features, width = values_NK.shape
    groups = scales_NG.shape[1]
    chunk = chunk_of(width, groups)
    filled = F.pad(values_NK, (0, -width % chunk, 0, -num_features % LANES))
    if bits == 4:
        filled = filled[:, ::2] & 15 | filled[:, 1::2] << 4
    words = _tiles(filled.view(torch.int32))
    zeros = None if zeros_NG is None else _tiles(zeros_NG)
    return LanesWeight(words, _tiles(scales_NG), zeros, bits, num_features, width, groups)


def lanes_of_words(
    words_NX: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, bits: int, width: int
) -> LanesWeight | None:
    """`to_lanes` of codes that come packed: int32 [N, X] of neighbours along K as q + 2^(bits - 1), the first lowest.

    These are the words of the layout but for the highest bit of each code. None where they do not fill whole chunks.
    """
    num_features, groups = scales_NG.shape
    if width % chunk_of(width, groups):
        return None
    words = _tiles(words_NX.bitwise_xor(-0x77777778 if bits == 4 else -0x7F7F7F80))
    zeros = None if zeros_NG is None else _tiles(zeros_NG)
    return LanesWeight(words, _tiles(scales_NG), zeros, bits, num_features, width, groups)


def _tiles(x_NX: Tensor) -> Tensor:
    """[N, X] as [T, X, 16], filled up with zeros."""
    filled = F.pad(x_NX, (0, 0, 0, -len(x_NX) % LANES))
    return filled.view(-1, LANES, x_NX.shape[1]).transpose(1, 2).contiguous()


def _from_tiles(x_TXL: Tensor, num_features: int) -> Tensor:
    return x_TXL.transpose(1, 2).flatten(0, 1)[:num_features].contiguous()


def from_lanes(weight: LanesWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values_NK, scales_NG, zeros_NG) as `to_lanes` got them."""
    codes = _from_tiles(weight.words, weight.num_features).view(torch.int8)
    if weight.bits == 4:
        codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(1)
    zeros = None if weight.zeros is None else _from_tiles(weight.zeros, weight.num_features)
    return codes[:, : weight.width].contiguous(), _from_tiles(weight.scales, weight.num_features), zeros


def join_lanes(weights: Sequence[LanesWeight]) -> tuple[LanesWeight, list[LanesWeight]]:
    """The outputs of several weights as those of one, and the weights again, in its memory.

    Bits, groups and scales are alike, and all but the last have whole tiles.
    """
    first = weights[0]
    words, scales = (torch.cat([getattr(one, name) for one in weights]) for name in ("words", "scales"))
    zeros = None if first.zeros is None else torch.cat([one.zeros for one in weights if one.zeros is not None])
    joined = replace(
        first, words=words, scales=scales, zeros=zeros, num_features=sum(one.num_features for one in weights)
    )
    tiles = [len(one.words) for one in weights]
    parts = zip(
        weights,
        words.split(tiles),
        scales.split(tiles),
        [None] * len(weights) if zeros is None else zeros.split(tiles),
        strict=True,
    )
    return joined, [replace(one, words=word, scales=scale, zeros=zero) for one, word, scale, zero in parts]


def codes_matvec(x_MK: Tensor, weight: LanesWeight, bias_N: Tensor | None = None) -> Tensor:
    """x w^T + bias in the dtype of x (fp32, bf16 or fp16), by the loops; made for few rows. Shapes are not checked."""
    from trine.kernels.cpu.codes_loops import multiply_codes

    use_torch_threads()
    y_MN = torch.empty(len(x_MK), weight.num_features)
    x_MX = x_MK if weight.width % weight.chunk == 0 else F.pad(x_MK, (0, -weight.width % weight.chunk))
    multiply_codes(*weight.arguments, single(x_MX), single(bias_N), array(y_MN))
    return y_MN.to(x_MK.dtype)


def lanes_pieces(weight: LanesWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some outputs after the other, as w_Kn in fp32 or bf16 in one buffer, which the next piece overwrites."""
    from trine.kernels.cpu.codes_loops import dequantize_codes

    use_torch_threads()
    filled = weight.width + -weight.width % weight.chunk
    num_tiles = len(weight.words)
    step = min(num_tiles, max(1, _PIECE_NUMBERS // (filled * LANES)))
    buffer_XN = torch.empty(filled, step * LANES, dtype=dtype)
    for tile in range(0, num_tiles, max(1, step)):
        dequantize_codes(*weight.arguments, tile, min(step, num_tiles - tile), array(buffer_XN))
        outputs = slice(tile * LANES, min(weight.num_features, (tile + step) * LANES))
        yield outputs, buffer_XN[: weight.width, : outputs.stop - outputs.start]


def dequantize_lanes(weight: LanesWeight, dtype: torch.dtype) -> Tensor:
    """w_NK in fp32 or bf16: (q - z) s in fp32, rounded once."""
    w_NK = torch.empty(weight.num_features, weight.width, dtype=dtype)
    for outputs, w_Kn in lanes_pieces(weight, dtype):
        w_NK[outputs] = w_Kn.t()
    return w_NK


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether this CPU has matrix tiles (AMX) that this process may use; asks the system for them."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@lru_cache(maxsize=1)
def tile_shapes() -> np.ndarray[Any, Any]:
    """What a thread gives its tiles: palette 1; every tile 16 rows of 64 bytes."""
    table = np.zeros(64, np.uint8)
    table[0] = 1
    table[16:32:2] = 64
    table[48:56] = 16
    return table


def _check_tiles() -> None:
    if not has_tiles():
        raise RuntimeError("this CPU has no matrix tiles (AMX), or the system does not lend them; use codes_matvec")


def tiles_matmul(x_MK: Tensor, weight: LanesWeight, bias_N: Tensor | None = None) -> Tensor:
    """x w^T + bias in bf16 for rows of bf16, in matrix tiles (`tiles_loops.py`). RuntimeError where there are none."""
    _check_tiles()
    from trine.kernels.cpu.tiles_loops import multiply_in_tiles

    use_torch_threads()
    y_MN = torch.empty(len(x_MK), weight.num_features)
    x_MX = F.pad(x_MK, (0, -weight.width % weight.chunk, 0, -len(x_MK) % LANES))
    multiply_in_tiles(*weight.arguments, array(x_MX), tile_shapes(), array(y_MN))
    return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(x_MK.dtype)


def slabs_matmul(x_MK: Tensor, weight: LanesWeight, bias_N: Tensor | None = None) -> Tensor:
    """x w^T + bias in bf16 for rows of bf16, w rounded once to bf16 (`slab_tiles_loops.py`). RuntimeError as above."""
    _check_tiles()
    from trine.kernels.cpu.slab_tiles_loops import lay_tiles, multiply_slabs

    use_torch_threads()
    filled = F.pad(x_MK, (0, -weight.width % weight.chunk, 0, -len(x_MK) % (2 * LANES))).contiguous()
    laid, width = torch.empty_like(filled), filled.shape[1]
    lay_tiles(array(filled).reshape(-1), width, array(laid).reshape(-1))
    y_MX = torch.empty(len(filled), len(weight.words) * LANES, dtype=x_MK.dtype)
    bias = torch.zeros(y_MX.shape[1])
    if bias_N is not None:
        bias[: len(bias_N)] = bias_N
    multiply_slabs(*weight.arguments, array(laid).reshape(-1), width, tile_shapes(), array(bias), array(y_MX))
    return y_MX[: len(x_MK), : weight.num_features]
