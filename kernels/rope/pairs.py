"""Loading and storing heads as pairs of channels, for the rotary kernels.

Heads are the rows of a matrix: row n is head n % H of token n // H. The tokens of a tensor lie at one stride, which is
all that tells a joined product from q, k and v. So neighbouring rows share the angles of a token, every load and store
is of 16 bytes where sizes allow, and both channels of a pair are in one program.

ROWS rows, BLOCK_R >= R pairs, BLOCK_P channels that are not turned. Everything loaded becomes fp32, and zero where
there is nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.language import INTERPRETED


@triton.jit
def head_places(rows, stride, num_heads, D: tl.constexpr):
    """Where the heads of these rows begin, given the stride of tokens."""
    return (rows // num_heads).to(tl.int64) * stride + (rows % num_heads) * D


@triton.jit
def load_pairs(ptr, places, inside, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first and the second channels of the pairs, each [ROWS, BLOCK_R]."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * BLOCK_R)
        mask = inside[:, None] & (channels[None, :] < 2 * R)
        both = tl.load(ptr + places[:, None] + channels[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, [places.shape[0], BLOCK_R, 2]))
    else:
        pairs = tl.arange(0, BLOCK_R)
        mask = inside[:, None] & (pairs[None, :] < R)
        first = tl.load(ptr + places[:, None] + pairs[None, :], mask=mask, other=0.0)
        second = tl.load(ptr + places[:, None] + (R + pairs)[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(ptr, places, inside, first, second, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The reverse of `load_pairs`."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * BLOCK_R)
        mask = inside[:, None] & (channels[None, :] < 2 * R)
        both = tl.interleave(first.to(ptr.dtype.element_ty), second.to(ptr.dtype.element_ty))
        tl.store(ptr + places[:, None] + channels[None, :], both, mask=mask)
    else:
        pairs = tl.arange(0, BLOCK_R)
        mask = inside[:, None] & (pairs[None, :] < R)
        tl.store(ptr + places[:, None] + pairs[None, :], first.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + places[:, None] + (R + pairs)[None, :], second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rest(ptr, places, inside, D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr):
    """The channels from 2R on: [ROWS, BLOCK_P]."""
    rest = 2 * R + tl.arange(0, BLOCK_P)
    mask = inside[:, None] & (rest[None, :] < D)
    return tl.load(ptr + places[:, None] + rest[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rest(ptr, places, inside, x, D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr):
    """The reverse of `load_rest`."""
    rest = 2 * R + tl.arange(0, BLOCK_P)
    mask = inside[:, None] & (rest[None, :] < D)
    tl.store(ptr + places[:, None] + rest[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(cos_ptr, sin_ptr, rows, inside, num_heads, period, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """cos and sin of these rows, each [ROWS, BLOCK_R]; the tables repeat after `period` tokens."""
    pairs = tl.arange(0, BLOCK_R)
    mask = inside[:, None] & (pairs[None, :] < R)
    places = (((rows // num_heads) % period).to(tl.int64) * R)[:, None] + pairs[None, :]
    cos = tl.load(cos_ptr + places, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_pair_scales(weight_ptr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr):
    """The factors of a norm, weight or 1 + weight (UNIT), for the first and the second channels: each [BLOCK_R]."""
    pairs = tl.arange(0, BLOCK_R)
    first = 2 * pairs if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else first + R
    scale1 = tl.load(weight_ptr + first, mask=pairs < R, other=0.0).to(tl.float32)
    scale2 = tl.load(weight_ptr + second, mask=pairs < R, other=0.0).to(tl.float32)
    if UNIT:
        scale1 += 1.0
        scale2 += 1.0
    return scale1, scale2


@triton.jit
def load_rest_scales(weight_ptr, D: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr):
    """The same for the channels from 2R on: [BLOCK_P]."""
    rest = 2 * R + tl.arange(0, BLOCK_P)
    scale = tl.load(weight_ptr + rest, mask=rest < D, other=0.0).to(tl.float32)
    return scale + 1.0 if UNIT else scale


@triton.jit
def round_to(x, LIKE: tl.constexpr):
    """fp32 `x` rounded to a dtype; left alone for bf16 in the interpreter, which would truncate."""
    if INTERPRETED and tl.bfloat16 == LIKE:
        return x
    return x.to(LIKE).to(tl.float32)
