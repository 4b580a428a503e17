"""The kernel of the cache write: q turned and stored, k turned and v copied into their slots, quantized where asked.

The first programs take blocks of q heads, the next ones of k, the last ones of v. Heads are rows (`rope/pairs.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.rope.pairs import head_places, load_rest, store_pairs, store_rest
from trine.kernels.rope.rotation import turn_heads, turned

# Adding and taking away 1.5 * 2^23 leaves an fp32 rounded to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _quantized(x, scale, LIKE: tl.constexpr):
    """x / scale in the dtype of the pool."""
    y = x / scale[:, None]
    if tl.int8 == LIKE:
        y = (y + _ROUNDER) - _ROUNDER
    return y


@triton.jit
def _largest(x):
    return tl.max(tl.abs(x), axis=1)


@triton.jit
def _scale_of(largest, LIKE: tl.constexpr):
    """The scale that puts the largest number of a head at the end of the range; 1 for a head of zeros."""
    top = 127.0 if tl.int8 == LIKE else 448.0
    return tl.where(largest > 0.0, largest / top, 1.0)


# Numbers that change with the tokens of a step, so that one kernel serves them all.
@triton.jit(do_not_specialize=["period", "num_tokens", "q_programs", "k_programs"])
def write_kernel(
    q_in_ptr, k_in_ptr, v_in_ptr, q_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, q_weight_ptr,
    k_weight_ptr, cos_ptr, sin_ptr, q_in_stride, k_in_stride, v_in_stride, k_slot_stride, v_slot_stride, period,
    num_tokens, num_heads, num_kv_heads, q_programs, k_programs, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """See above. Slots are int64, -1 for tokens that are not kept; a slot of the pool has one stride."""
    program = tl.program_id(0)
    LIKE: tl.constexpr = k_cache_ptr.dtype.element_ty
    if program < q_programs:
        turn_heads(
            q_in_ptr, q_in_stride, q_ptr, num_heads * D, q_weight_ptr, cos_ptr, sin_ptr, period, program, num_tokens,
            num_heads, eps, 1.0, D, R, INTERLEAVED, UNIT_OFFSET, ROWS, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        rows = (program - q_programs) * ROWS + tl.arange(0, ROWS)
        inside = rows < num_tokens * num_kv_heads
        slots = tl.load(slots_ptr + rows // num_kv_heads, mask=inside, other=-1)
        first, second, rest = turned(
            k_in_ptr, head_places(rows, k_in_stride, num_kv_heads, D), rows, inside, k_weight_ptr, cos_ptr, sin_ptr,
            period, num_kv_heads, eps, 1.0, D, R, INTERLEAVED, UNIT_OFFSET, BLOCK_R, BLOCK_P,
        )  # fmt: skip
        kept = inside & (slots >= 0)
        if k_scale_ptr is not None:
            largest = tl.maximum(_largest(first), _largest(second))
            if D > 2 * R:
                largest = tl.maximum(largest, _largest(rest))
            scale = _scale_of(largest, LIKE)
            tl.store(k_scale_ptr + slots * num_kv_heads + rows % num_kv_heads, scale, mask=kept)
            first, second = _quantized(first, scale, LIKE), _quantized(second, scale, LIKE)
            rest = _quantized(rest, scale, LIKE)
        places = slots * k_slot_stride + (rows % num_kv_heads) * D
        store_pairs(k_cache_ptr, places, kept, first, second, R, INTERLEAVED, BLOCK_R)
        if D > 2 * R:
            store_rest(k_cache_ptr, places, kept, rest, D, R, BLOCK_P)
    else:
        rows = (program - q_programs - k_programs) * ROWS + tl.arange(0, ROWS)
        inside = rows < num_tokens * num_kv_heads
        slots = tl.load(slots_ptr + rows // num_kv_heads, mask=inside, other=-1)
        x = load_rest(v_in_ptr, head_places(rows, v_in_stride, num_kv_heads, D), inside, D, 0, BLOCK_D)
        kept = inside & (slots >= 0)
        if v_scale_ptr is not None:
            scale = _scale_of(_largest(x), LIKE)
            tl.store(v_scale_ptr + slots * num_kv_heads + rows % num_kv_heads, scale, mask=kept)
            x = _quantized(x, scale, LIKE)
        store_rest(v_cache_ptr, slots * v_slot_stride + (rows % num_kv_heads) * D, kept, x, D, 0, BLOCK_D)
