"""Random bits that are a function of seed, update and position, and rounding to bf16 with them.

Philox 4x32-10 maps a key (the seed) and a counter to four random words. Positions of a tensor are taken in groups of
2048 = 8 parts of 256 lanes: the counter (group * 256 + lane, tensor, update, purpose) gives eight draws of 16 bits, one
for that lane in each part, so that one call serves eight numbers whatever the block sizes of a kernel.

Stochastic rounding adds a draw to the 16 bits that bf16 cuts off and cuts: x goes up with exactly the probability of
its distance from below, so the expectation of the result is x.
Sources: Salmon et al. 2011 (Philox); Gupta et al. 2015, arXiv 1502.02551 (stochastic rounding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 256
PARTS = 8
GROUP = LANES * PARTS
# What draws are for: the fourth word of the counter.
FOR_PARAMETER, FOR_MOMENTS = 0, 1

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 of counters (four int64 tensors of 32-bit words); four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products of 32-bit words fill 64 bits; their upper half is right although int64 wraps.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((b >> 32) & _WORD) ^ c1 ^ k0, ((a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def draws(
    size: int, device: torch.device, *, seed: int, tensor: int, update: int, purpose: int, start: int = 0
) -> Tensor:
    """int32 [size]: the draws, 0 to 65535, of a tensor's positions from `start` (a multiple of 2048) on."""
    counters = torch.arange(start // PARTS, start // PARTS + -(-size // GROUP) * LANES, device=device)
    words = philox(
        (counters, *(torch.full_like(counters, value) for value in (tensor, update, purpose))),  # type: ignore[arg-type]
        (seed & _WORD, seed >> 32),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack([half.view(-1, LANES) for half in halves], dim=1).view(-1)[:size].int()


def round_stochastically(x: Tensor, draws: Tensor) -> Tensor:
    """fp32 `x` in bf16, up or down by the draws (int32, 0 to 65535, in the shape of x); NaN stays NaN."""
    bits = (x.view(torch.int32) + draws) >> 16
    return torch.where(x.isnan(), 0x7FC0, bits).to(torch.int16).view(torch.bfloat16)


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def draw_words(seed, counter, tensor, update, PURPOSE: tl.constexpr):
    """The four words of a counter's eight draws."""
    zero = counter * 0
    return tl.philox(seed, counter, zero + tensor, zero + update, zero + PURPOSE)


@triton.jit
def draw(words0, words1, words2, words3, PART: tl.constexpr):
    """The draws of a part, uint32."""
    if PART // 2 == 0:
        word = words0
    elif PART // 2 == 1:
        word = words1
    elif PART // 2 == 2:
        word = words2
    else:
        word = words3
    if PART % 2 == 0:
        return word & 0xFFFF
    return word >> 16


@triton.jit
def bf16_bits(x, added):
    """The bits of fp32 `x` in bf16, uint16: `added` (uint32) goes to the bits that are cut off."""
    bits = (x.to(tl.uint32, bitcast=True) + added) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.uint16)


@triton.jit
def half_to_even(x):
    """What `bf16_bits` must add to round to nearest, ties to even."""
    return ((x.to(tl.uint32, bitcast=True) >> 16) & 1) + 0x7FFF


@triton.jit
def from_bf16_bits(bits):
    """uint16 as the fp32 number whose bf16 they are."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
