"""AdamW's moments in 8 bits: eight levels to the octave, scaled by blocks of 256.

A block of 256 numbers in a row keeps its largest magnitude s (fp32) and a code of 8 bits for each number:

    first moment    int8, sign and magnitude:   x = sign(c) s 2^((|c| - 127) / 8),  |c| from 1 to 127;  x = 0 for c = 0
    second moment   uint8:                      x = s 2^((c - 255) / 8),             c from 1 to 255;   x = 0 for c = 0

Encoding rounds stochastically between the two neighbouring levels, so that the expectation of what is decoded is x. To
the nearest level, a moving average would stand still: its steps of 1 - beta are smaller than half a level. One draw
serves both moments of a number, so that their errors go the same way and partly cancel in m / sqrt(v). Levels are
2^(1/8) apart: the error is below 9.1 % of x, about 3.6 % in the root of the mean square. Below the smallest level,
2^-15.75 s, the first moment is rounded between zero and that level, an error of less than 2^-15.75 s. The second
moment divides: below its smallest level, 2^-31.75 s, it becomes that level, never zero, so that an update can only
become smaller; zero itself stays zero.

A number takes 1 byte and 4 / 256 for its share of the scale, instead of 4.
After: Dettmers et al. 2022, arXiv 2110.02861 (block-wise 8-bit states, with other levels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.adamw.rounding import LANES

BLOCK = LANES
FIRST_TOP, SECOND_TOP = 127, 255
RATIO = 2 ** (1 / 8)
# Smaller than the smallest level of either moment; what logarithms are taken of.
_FLOOR = 2.0**-40


def empty_states(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both moments of `size` numbers at zero: codes int8 [size] and uint8 [size], and their scales."""
    scales = [torch.zeros(-(-size // BLOCK), device=device) for _ in range(2)]
    codes = (torch.zeros(size, dtype=dtype, device=device) for dtype in (torch.int8, torch.uint8))
    return *codes, *scales  # type: ignore[return-value]


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 [size] of either moment, told apart by the dtype of the codes."""
    top = SECOND_TOP if codes.dtype == torch.uint8 else FIRST_TOP
    signed = codes.float()
    levels = torch.exp2((signed.abs() - top) * 0.125) * signed.sign()
    return levels * scales.repeat_interleave(BLOCK)[: len(codes)]


def encode_first(x: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales of fp32 `x` [size], with draws of 16 bits (int32 [size])."""
    ratio, scales = _over_scale(x.abs())
    place, code = _between(ratio, draws, FIRST_TOP)
    below = (draws < ratio * (2.0 ** ((FIRST_TOP - 1) / 8) * 65536)).float()
    return (torch.where(place < 1, below, code) * x.sign()).to(torch.int8), scales


def encode_second(x: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales of fp32 `x` [size], not negative, with draws of 16 bits (int32 [size])."""
    ratio, scales = _over_scale(x)
    place, code = _between(ratio, draws, SECOND_TOP)
    return torch.where(place < 1, (x > 0).float(), code).to(torch.uint8), scales


def _over_scale(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Each number over the largest of its block, and those."""
    size = len(magnitude)
    blocks = torch.nn.functional.pad(magnitude, (0, -size % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(dim=1) if size else magnitude.new_zeros(0)
    return (blocks / torch.where(scales > 0, scales, 1.0)[:, None]).view(-1)[:size], scales


def _between(ratio: Tensor, draws: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Where a ratio lies among the levels, and the level above or below by chance; for places of at least 1."""
    place = torch.log2(ratio.clamp(min=_FLOOR)) * 8 + top
    low = place.floor().clamp(min=1)
    share = (ratio / torch.exp2((low - top) * 0.125) - 1) * (65536 / (RATIO - 1))
    return place, (low + (draws < share).float()).clamp(max=top)


# --- Triton -----------------------------------------------------------------------------------------------------------

_SHARE = tl.constexpr(65536 / (RATIO - 1))
_TRITON_FLOOR = tl.constexpr(_FLOOR)
_BELOW = tl.constexpr(2.0 ** ((FIRST_TOP - 1) / 8) * 65536)
FIRST = tl.constexpr(FIRST_TOP)
SECOND = tl.constexpr(SECOND_TOP)


@triton.jit
def decode_levels(codes, scales, TOP: tl.constexpr):
    """fp32 of codes [ROWS, 256] of one block to the row; scales [ROWS]."""
    signed = codes.to(tl.float32)
    levels = tl.exp2((tl.abs(signed) - TOP) * 0.125)
    levels = tl.where(signed == 0.0, 0.0, tl.where(signed < 0.0, -levels, levels))
    return levels * scales[:, None]


@triton.jit
def encode_levels(x, draws, TOP: tl.constexpr):
    """Codes (fp32, whole numbers) and scales [ROWS] of x [ROWS, 256], one block to the row."""
    magnitude = tl.abs(x)
    scales = tl.max(magnitude, axis=1)
    ratio = magnitude / tl.where(scales > 0.0, scales, 1.0)[:, None]
    place = tl.log2(tl.maximum(ratio, _TRITON_FLOOR)) * 8 + TOP
    low = tl.maximum(tl.floor(place), 1.0)
    draws = draws.to(tl.float32)
    share = (ratio / tl.exp2((low - TOP) * 0.125) - 1.0) * _SHARE
    code = tl.minimum(low + tl.where(draws < share, 1.0, 0.0), TOP)
    up = magnitude > 0.0 if TOP == SECOND else draws < ratio * _BELOW
    code = tl.where(place < 1.0, tl.where(up, 1.0, 0.0), code)
    return tl.where(x < 0.0, -code, code), scales
