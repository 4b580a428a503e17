"""Sampling, the launch over rows with filters: thresholds among the candidates, which lie in registers, and the draw.

Nothing is sorted. The threshold of top-k is the smallest value v with fewer than k logits above it, that of top-p the
smallest with less than p of the weight above it; both are found by cutting the range of values in nine until one value
is left, at most eleven times. Values are compared as integers whose order is that of the floats. The token is drawn
through the inverse of the cumulative distribution, in the order of the vocabulary.

A row with more candidates than fit is read anew for every cut of the range, by the same program, block by block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.sampling.kernels import (
    CHOSEN_AT,
    COUNTS_AT,
    CUTS,
    HELD_AT,
    TOTAL_AT,
    WEIGHTS_AT,
    load_scaled,
    ordered,
    store_token,
)

# One below the integer of -inf.
_BELOW_ALL = tl.constexpr(-2139095042)
# At how many places a range is cut at once.
_PLACES = tl.constexpr(8)


@triton.jit
def _places(low, high):
    """Values that cut a range into nine; at least one lies strictly inside, if any value does."""
    return low + (high - low) * (tl.arange(0, _PLACES).to(tl.int64) + 1) // (_PLACES + 1)


@triton.jit
def _narrow(places, above, low, high, limit):
    """What lies above `low` reaches the limit (or is everything); what lies above `high` does not."""
    inner = places > low
    new_low = tl.max(tl.where(inner & (above >= limit), places, low), axis=0)
    new_high = tl.min(tl.where(inner & (above < limit), places, high), axis=0)
    return new_low, new_high


@triton.jit
def _threshold(order, weight, least, most, limit):
    """The smallest value of `least` to `most` (ordered integers) above which less than `limit` lies."""
    low = least.to(tl.int64) - 1
    high = most.to(tl.int64)
    while high - low > 1:
        places = _places(low, high)
        above = tl.sum(tl.where(order[None, :] > places.to(tl.int32)[:, None], weight[None, :], 0.0), axis=1)
        low, high = _narrow(places, above, low, high, limit)
    return high.to(tl.int32)


@triton.jit
def _draw_candidate(values_ptr, ids_ptr, held, top, top_k, top_p, min_p, total, uniform, size, CAPACITY: tl.constexpr):
    """A token of the candidates."""
    slots = tl.arange(0, CAPACITY)
    x = tl.load(values_ptr + slots, mask=slots < held, other=float("-inf"))
    order = ordered(x)
    weight = tl.exp(x - top)
    most = ordered(top)
    least = tl.min(tl.where(slots < held, order, most), axis=0)
    if (top_k > 0) & (top_k < size):
        least = _threshold(order, tl.where(slots < held, 1.0, 0.0), least, most, top_k.to(tl.float32))
        weight = tl.where(order >= least, weight, 0.0)
        total = tl.sum(weight, axis=0)
    if top_p < 1.0:
        least = _threshold(order, weight, least, most, top_p * total)
    weight = tl.where((order >= least) & (weight >= min_p), weight, 0.0)
    reached = tl.cumsum(weight, axis=0).to(tl.float64)
    whole = tl.max(reached, axis=0)
    # Rounding could lift the point to the total itself, which nothing exceeds.
    point = tl.minimum(uniform * whole, whole * (1.0 - 2.0**-52))
    last = tl.max(tl.where(weight > 0.0, slots, 0), axis=0)
    slot = tl.min(tl.where((reached > point) & (weight > 0.0), slots, last), axis=0)
    return tl.load(ids_ptr + slot)


@triton.jit
def _threshold_of_row(
    logits_ptr, allowed_ptr, size, temperature, top, least, limit, COUNT: tl.constexpr, LOOP: tl.constexpr
):  # fmt: skip
    """`_threshold` over a whole row, of its logits of `least` or more; the limit of weights (not COUNT) is a share."""
    if not COUNT:
        sums = tl.zeros([LOOP], dtype=tl.float32)
        for start in range(0, size, LOOP):
            x = load_scaled(logits_ptr, allowed_ptr, start + tl.arange(0, LOOP), size, temperature)
            sums += tl.where(ordered(x) >= least, tl.exp(x - top), 0.0)
        limit *= tl.sum(sums, axis=0)
    low = least.to(tl.int64) - 1
    high = ordered(top).to(tl.int64)
    while high - low > 1:
        places = _places(low, high)
        borders = places.to(tl.int32)
        above = tl.zeros([_PLACES, LOOP], dtype=tl.float32)
        for start in range(0, size, LOOP):
            x = load_scaled(logits_ptr, allowed_ptr, start + tl.arange(0, LOOP), size, temperature)
            weight = tl.where(x > float("-inf"), 1.0, 0.0) if COUNT else tl.exp(x - top)
            order = ordered(x)
            weight = tl.where(order >= least, weight, 0.0)
            above += tl.where(order[None, :] > borders[:, None], weight[None, :], 0.0)
        low, high = _narrow(places, tl.sum(above, axis=1), low, high, limit)
    return high.to(tl.int32)


@triton.jit
def _weights(logits_ptr, allowed_ptr, places, size, temperature, top, least, min_p):
    """exp(x - top) of the tokens that passed every filter, 0 elsewhere."""
    x = load_scaled(logits_ptr, allowed_ptr, places, size, temperature)
    weight = tl.exp(x - top)
    return tl.where((ordered(x) >= least) & (weight >= min_p), weight, 0.0)


@triton.jit
def _draw_from_row(
    logits_ptr, allowed_ptr, size, temperature, top, top_k, top_p, min_p, uniform, LOOP: tl.constexpr
):  # fmt: skip
    """A token of the whole row: the first one whose cumulative weight exceeds `uniform` of the total."""
    least = tl.full([], _BELOW_ALL + 1, dtype=tl.int32)
    if (top_k > 0) & (top_k < size):
        limit = top_k.to(tl.float32)
        least = _threshold_of_row(logits_ptr, allowed_ptr, size, temperature, top, least, limit, True, LOOP)
    if top_p < 1.0:
        least = _threshold_of_row(logits_ptr, allowed_ptr, size, temperature, top, least, top_p, False, LOOP)
    total = tl.full([], 0.0, dtype=tl.float64)
    for start in range(0, size, LOOP):
        places = start + tl.arange(0, LOOP)
        weight = _weights(logits_ptr, allowed_ptr, places, size, temperature, top, least, min_p)
        total += tl.sum(weight, axis=0).to(tl.float64)
    point = tl.minimum(uniform * total, total * (1.0 - 2.0**-52))
    token = -1
    reached = tl.full([], 0.0, dtype=tl.float64)
    for start in range(0, size, LOOP):
        places = start + tl.arange(0, LOOP)
        weight = _weights(logits_ptr, allowed_ptr, places, size, temperature, top, least, min_p)
        mass = tl.sum(weight, axis=0).to(tl.float64)
        if (token < 0) & (reached + mass > point):
            beyond = (reached + tl.cumsum(weight, axis=0).to(tl.float64) > point) & (weight > 0.0)
            # The sum and the last cumulative sum may differ by a rounding; then it is the last token of the block.
            last = tl.max(tl.where(weight > 0.0, places, -1), axis=0)
            token = tl.minimum(tl.min(tl.where(beyond, places, size), axis=0), last)
        reached += mass
    return token


@triton.jit
def choose_kernel(
    logits_ptr, allowed_ptr, uniforms_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, tokens_ptr, log_probs_ptr,
    floats_ptr, ints_ptr, logits_stride, allowed_stride, floats_stride, ints_stride, size, num_splits,
    SPLITS: tl.constexpr, CAPACITY: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """The token of one row that has filters, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    floats_ptr += row * floats_stride
    ints_ptr += row * ints_stride
    if tl.load(ints_ptr + SPLITS) != 0:
        logits_ptr += row * logits_stride
        allowed_row = allowed_ptr
        if allowed_ptr is not None:
            allowed_row = allowed_ptr + row * allowed_stride
        splits = tl.arange(0, SPLITS)
        tops = tl.load(floats_ptr + 2 * SPLITS + splits, mask=splits < num_splits, other=float("-inf"))
        top = tl.max(tops, axis=0)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        uniform = tl.load(uniforms_ptr + row)
        if tl.load(ints_ptr + SPLITS + CHOSEN_AT) < CUTS:
            values_ptr = floats_ptr + 4 * SPLITS + WEIGHTS_AT + CUTS * SPLITS
            ids_ptr = ints_ptr + SPLITS + COUNTS_AT + CUTS * SPLITS
            held = tl.load(ints_ptr + SPLITS + HELD_AT)
            total = tl.load(floats_ptr + 4 * SPLITS + TOTAL_AT)
            # Mostly they are few, and every cut of the range looks at all that could be held.
            FEW: tl.constexpr = CAPACITY // 8 if CAPACITY > 8 else CAPACITY
            if held <= FEW:
                token = _draw_candidate(
                    values_ptr, ids_ptr, held, top, top_k, top_p, min_p, total, uniform, size, FEW
                )  # fmt: skip
            else:
                token = _draw_candidate(
                    values_ptr, ids_ptr, held, top, top_k, top_p, min_p, total, uniform, size, CAPACITY
                )  # fmt: skip
        else:
            temperature = tl.load(temperature_ptr + row)
            token = _draw_from_row(
                logits_ptr, allowed_row, size, temperature, top, top_k, top_p, min_p, uniform, LOOP
            )  # fmt: skip
        store_token(logits_ptr, tokens_ptr, log_probs_ptr, floats_ptr, row, token, num_splits, SPLITS)
