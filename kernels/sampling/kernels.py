"""The sampling kernels: one program a row, several passes over its logits, which stay in the L2 cache.

Nothing is sorted. The threshold of top-k is the smallest value v with fewer than k logits above it, that of top-p the
smallest with less than p of the weight above it; both are found by cutting the range of values in four until one value
is left, 17 passes at most. Values are compared as integers whose order is that of the floats. The token is then drawn
through the inverse of the cumulative distribution, in the order of the vocabulary. All sums have one order: the bits
repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integers whose order is that of fp32: one below that of -inf.
_BELOW_ALL = tl.constexpr(-2139095042)


@triton.jit
def _order(x):
    """fp32 as int32 with the same order (-0.0 just below 0.0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(logits_ptr, allowed_ptr, places, size):
    """Logits as fp32, -inf past the end and where the bit of the token in `allowed` is 0."""
    inside = places < size
    x = tl.load(logits_ptr + places, mask=inside, other=float("-inf")).to(tl.float32)
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + places // 32, mask=inside, other=0)
        x = tl.where((words >> (places % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def _above(
    logits_ptr, allowed_ptr, size, temperature, top, least, first, second, third,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many logits (COUNT), or how much weight, lie above each of three values, among those of `least` or more."""
    sum1 = 0.0
    sum2 = 0.0
    sum3 = 0.0
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = _load(logits_ptr, allowed_ptr, places, size) / temperature
        order = _order(x)
        weight = tl.where(order >= least, tl.exp(x - top), 0.0)
        if COUNT:
            weight = tl.where((order >= least) & (x > float("-inf")), 1.0, 0.0)
        sum1 += tl.sum(tl.where(order > first, weight, 0.0), axis=0)
        sum2 += tl.sum(tl.where(order > second, weight, 0.0), axis=0)
        sum3 += tl.sum(tl.where(order > third, weight, 0.0), axis=0)
    return sum1, sum2, sum3


@triton.jit
def _threshold(logits_ptr, allowed_ptr, size, temperature, top, least, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest value (as an ordered integer) above which less than `limit` lies."""
    low = least.to(tl.int64) - 1
    high = _order(top).to(tl.int64)
    while high - low > 1:
        width = high - low
        first, second, third = low + width // 4, low + width // 2, low + width - width // 4 - 1
        third = tl.maximum(third, second)
        sum1, sum2, sum3 = _above(
            logits_ptr, allowed_ptr, size, temperature, top, least, first, second, third, COUNT, BLOCK
        )
        # What lies above `low` reaches the limit (or is everything); what lies above `high` does not.
        if (sum1 < limit) & (first > low):
            high = first
        elif (sum2 < limit) & (second > low):
            low = first
            high = second
        elif (sum3 < limit) & (third > low):
            low = second
            high = third
        else:
            low = third
    return high.to(tl.int32)


@triton.jit
def sample_kernel(
    logits_ptr, allowed_ptr, uniforms_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, tokens_ptr, log_probs_ptr,
    logits_stride, allowed_stride, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token of one row and its log-probability; -1 and NaN where the row holds no finite logit that is allowed."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    allowed_row = allowed_ptr
    if allowed_ptr is not None:
        allowed_row = allowed_ptr + row.to(tl.int64) * allowed_stride

    # The log-sum-exp of the row as it is, and the largest logit that is allowed (the first one, where several are).
    raw_top = float("-inf")
    raw_sum = 0.0
    top = float("-inf")
    best = -1
    strange = 0
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        raw = _load(logits_ptr, None, places, size)
        odd = (raw != raw) | (raw == float("inf"))
        strange += tl.sum(odd.to(tl.int32), axis=0)
        raw = tl.where(odd, float("-inf"), raw)
        new_top = tl.maximum(raw_top, tl.max(raw, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        raw_sum = raw_sum * tl.exp(raw_top - safe) + tl.sum(tl.exp(raw - safe), axis=0)
        raw_top = new_top
        x = _load(logits_ptr, allowed_row, places, size)
        block_top = tl.max(x, axis=0)
        if block_top > top:
            top = block_top
            best = start + tl.argmax(x, axis=0)

    token = best
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0.0) & (strange == 0) & (best >= 0):
        scaled_top = top / temperature
        least = tl.full([], _BELOW_ALL + 1, dtype=tl.int32)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < size):
            least = _threshold(
                logits_ptr, allowed_row, size, temperature, scaled_top, least, top_k.to(tl.float32), True, BLOCK
            )
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            total, _, _ = _above(
                logits_ptr, allowed_row, size, temperature, scaled_top, least, _BELOW_ALL, _BELOW_ALL, _BELOW_ALL,
                False, BLOCK,
            )  # fmt: skip
            least = _threshold(
                logits_ptr, allowed_row, size, temperature, scaled_top, least, top_p * total, False, BLOCK
            )
        min_p = tl.load(min_p_ptr + row)
        token = _draw(
            logits_ptr, allowed_row, size, temperature, scaled_top, least, min_p, tl.load(uniforms_ptr + row), BLOCK
        )
    if strange > 0:
        token = -1
    tl.store(tokens_ptr + row, token)
    chosen = tl.load(logits_ptr + tl.maximum(token, 0)).to(tl.float32)
    log_prob = float("nan")
    if token >= 0:
        log_prob = chosen - raw_top - tl.log(raw_sum)
    tl.store(log_probs_ptr + row, log_prob)


@triton.jit
def _weights(logits_ptr, allowed_ptr, places, size, temperature, top, least, min_p):
    """exp(x - top) of the tokens that passed every filter, 0 elsewhere."""
    x = _load(logits_ptr, allowed_ptr, places, size) / temperature
    weight = tl.exp(x - top)
    return tl.where((_order(x) >= least) & (weight >= min_p), weight, 0.0)


@triton.jit
def _draw(logits_ptr, allowed_ptr, size, temperature, top, least, min_p, uniform, BLOCK: tl.constexpr):
    """The first token whose cumulative weight exceeds `uniform` of the total."""
    total = tl.full([], 0.0, dtype=tl.float64)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        weight = _weights(logits_ptr, allowed_ptr, places, size, temperature, top, least, min_p)
        total += tl.sum(weight, axis=0).to(tl.float64)
    # Rounding could lift the point to the total itself, which nothing exceeds.
    point = tl.minimum(uniform * total, total * (1.0 - 2.0**-52))
    token = -1
    reached = tl.full([], 0.0, dtype=tl.float64)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
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
def adjust_kernel(
    logits_ptr, starts_ptr, tokens_ptr, counts_ptr, biases_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    logits_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Penalties (where there are counts) or biases for the listed tokens of one row, in place; each is listed once."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    begin, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    for start in range(begin, end, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        inside = entries < end
        tokens = tl.load(tokens_ptr + entries, mask=inside, other=0)
        x = tl.load(logits_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        if counts_ptr is not None:
            repetition = tl.load(repetition_ptr + row)
            x = tl.where(x < 0.0, x * repetition, x / repetition)
            counts = tl.load(counts_ptr + entries, mask=inside, other=0).to(tl.float32)
            x -= tl.load(presence_ptr + row) * tl.where(counts > 0.0, 1.0, 0.0)
            x -= tl.load(frequency_ptr + row) * counts
        if biases_ptr is not None:
            x += tl.load(biases_ptr + entries, mask=inside, other=0.0)
        tl.store(logits_ptr + tokens, x.to(logits_ptr.dtype.element_ty), mask=inside)
