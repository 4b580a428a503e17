"""Sampling, the launches over the splits of all rows: each program holds one split of one row in registers.

    scan     the log-sum-exp of the split as it is; its largest allowed logit, the token, the weight beside it
    cut      greedy rows end here, and rows without filters draw here: first the split, by the weights, then the token
             in it. For the others: how many logits, and how much weight, lie above each of 16 cuts below the row's top
    gather   the row's cut is the highest one that holds whatever its filters keep; the logits above it are written
             out, in the order of the vocabulary: what lies above it in the splits before gives each its place

No sum depends on which program comes first: the bits repeat.
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
    load_logits,
    load_scaled,
    store_token,
)

# The lowest finite fp32.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Cuts that are summed at once: all 16 would take most of the registers, and leave room for one program at a time.
_TOGETHER = tl.constexpr(4)


@triton.jit
def scan_kernel(
    logits_ptr, allowed_ptr, temperature_ptr, floats_ptr, ints_ptr,
    logits_stride, allowed_stride, floats_stride, ints_stride, size, num_splits,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The numbers of one split. A NaN or +inf anywhere, allowed or not, makes its largest allowed logit +inf."""
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    logits_ptr += row * logits_stride
    allowed_row = allowed_ptr
    if allowed_ptr is not None:
        allowed_row = allowed_ptr + row * allowed_stride
    floats_ptr += row * floats_stride + split
    places = split * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ptr + row)
    raw = load_logits(logits_ptr, None, places, size)
    raw_top = tl.max(raw, axis=0)
    # Neither inf - inf, nor a look at every logit: what is NaN or +inf makes the sum so.
    raw_sum = tl.sum(tl.exp(raw - tl.where(tl.abs(raw_top) == float("inf"), 0.0, raw_top)), axis=0)
    strange = (raw_sum != raw_sum) | (raw_sum == float("inf"))
    x = load_scaled(logits_ptr, allowed_row, places, size, temperature)
    top = tl.max(x, axis=0)
    tl.store(floats_ptr, raw_top)
    tl.store(floats_ptr + SPLITS, raw_sum)
    tl.store(floats_ptr + 2 * SPLITS, tl.where(strange, float("inf"), top))
    # Rows that draw need the weight, greedy ones the token.
    if temperature > 0.0:
        mass = tl.sum(tl.exp(x - tl.where(tl.abs(top) == float("inf"), 0.0, top)), axis=0)
        tl.store(floats_ptr + 3 * SPLITS, mass)
    else:
        tl.store(ints_ptr + row * ints_stride + split, tl.min(tl.where(x == top, places, size), axis=0))


@triton.jit
def cut_kernel(
    logits_ptr, allowed_ptr, uniforms_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, tokens_ptr, log_probs_ptr,
    floats_ptr, ints_ptr, logits_stride, allowed_stride, floats_stride, ints_stride, size, num_splits,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One split: what lies above the cuts, or the end of a row without filters. State 1: the row needs more."""
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    logits_ptr += row * logits_stride
    allowed_row = allowed_ptr
    if allowed_ptr is not None:
        allowed_row = allowed_ptr + row * allowed_stride
    floats_ptr += row * floats_stride
    ints_ptr += row * ints_stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    limited = (top_k > 0) & (top_k < size)
    filtered = limited | (tl.load(top_p_ptr + row) < 1.0) | (tl.load(min_p_ptr + row) > 0.0)
    splits = tl.arange(0, SPLITS)
    tops = tl.load(floats_ptr + 2 * SPLITS + splits, mask=splits < num_splits, other=float("-inf"))
    top = tl.max(tops, axis=0)
    draws = (temperature > 0.0) & (top > float("-inf")) & (top < float("inf"))
    if split == 0:
        tl.store(ints_ptr + SPLITS, (draws & filtered).to(tl.int32))
    places = split * BLOCK + tl.arange(0, BLOCK)
    if draws:
        if filtered:
            # Where top-k counts, steps are those of the logits as given: how many lie above does not change with the
            # temperature. Elsewhere weights decide, which depend on distances in scaled logits.
            unit = tl.where(limited, 1.0 / temperature, 1.0)
            x = load_scaled(logits_ptr, allowed_row, places, size, temperature)
            weight = tl.exp(x - top)
            own = tl.max(x, axis=0)
            for first in range(0, CUTS, _TOGETHER):
                columns = first + tl.arange(0, _TOGETHER)
                cuts = tl.maximum(top - tl.exp2(columns * 0.5 - 2.0) * unit, _LOWEST)
                cuts = tl.where(columns == CUTS - 1, _LOWEST, cuts)
                to = split * CUTS + columns
                # Most splits have nothing above the cuts that are near the row's top.
                if own >= tl.min(cuts, axis=0):
                    above = x[None, :] >= cuts[:, None]
                    tl.store(ints_ptr + SPLITS + COUNTS_AT + to, tl.sum(above.to(tl.int32), axis=1))
                    # Top-k counts, whatever the weights are.
                    if not limited:
                        weights = tl.sum(tl.where(above, weight[None, :], 0.0), axis=1)
                        tl.store(floats_ptr + 4 * SPLITS + WEIGHTS_AT + to, weights)
                else:
                    tl.store(ints_ptr + SPLITS + COUNTS_AT + to, tl.zeros([_TOGETHER], dtype=tl.int32))
                    tl.store(floats_ptr + 4 * SPLITS + WEIGHTS_AT + to, tl.zeros([_TOGETHER], dtype=tl.float32))
                if split == 0:
                    tl.store(floats_ptr + 4 * SPLITS + columns, cuts)
        else:
            masses = tl.load(floats_ptr + 3 * SPLITS + splits, mask=splits < num_splits, other=0.0)
            parts = (masses * tl.exp(tops - top)).to(tl.float64)
            ends = tl.cumsum(parts, axis=0)
            total = tl.max(ends, axis=0)
            # Rounding could lift the point to the total itself, which nothing exceeds.
            point = tl.minimum(tl.load(uniforms_ptr + row) * total, total * (1.0 - 2.0**-52))
            last = tl.max(tl.where(parts > 0.0, splits, 0), axis=0)
            chosen = tl.min(tl.where((ends > point) & (parts > 0.0), splits, last), axis=0)
            if split == chosen:
                begin = tl.sum(tl.where(splits == split - 1, ends, 0.0), axis=0)
                own = tl.max(tl.where(splits == split, tops, float("-inf")), axis=0)
                weight = tl.exp(load_scaled(logits_ptr, allowed_row, places, size, temperature) - own)
                reached = begin + tl.cumsum(weight, axis=0).to(tl.float64) * tl.exp(own - top).to(tl.float64)
                # The sum and the last cumulative sum may differ by a rounding; then it is the last token.
                last = tl.max(tl.where(weight > 0.0, places, -1), axis=0)
                token = tl.min(tl.where((reached > point) & (weight > 0.0), places, last), axis=0)
                store_token(logits_ptr, tokens_ptr, log_probs_ptr, floats_ptr, row, token, num_splits, SPLITS)
    elif split == 0:
        bests = tl.load(ints_ptr + splits, mask=splits < num_splits, other=size)
        best = tl.min(tl.where(tops == top, bests, size), axis=0)
        token = tl.where((top > float("-inf")) & (top < float("inf")), best, -1)
        store_token(logits_ptr, tokens_ptr, log_probs_ptr, floats_ptr, row, token, num_splits, SPLITS)


@triton.jit
def gather_kernel(
    logits_ptr, allowed_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, floats_ptr, ints_ptr,
    logits_stride, allowed_stride, floats_stride, ints_stride, size, num_splits,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The candidates of one split; the first split notes the row's cut (16: none fits) and how many lie above it."""
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    floats_ptr += row * floats_stride
    ints_ptr += row * ints_stride
    if tl.load(ints_ptr + SPLITS) != 0:
        logits_ptr += row * logits_stride
        allowed_row = allowed_ptr
        if allowed_ptr is not None:
            allowed_row = allowed_ptr + row * allowed_stride
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        limited = (top_k > 0) & (top_k < size)
        unlimited = (top_k <= 0) | (top_k >= size)
        columns = tl.arange(0, CUTS)
        splits = tl.arange(0, SPLITS)
        table = splits[:, None] * CUTS + columns[None, :]
        inside = splits[:, None] < num_splits
        counts_SC = tl.load(ints_ptr + SPLITS + COUNTS_AT + table, mask=inside, other=0)
        weighs = inside & unlimited
        weights_SC = tl.load(floats_ptr + 4 * SPLITS + WEIGHTS_AT + table, mask=weighs, other=0.0)
        tops = tl.load(floats_ptr + 2 * SPLITS + splits, mask=splits < num_splits, other=float("-inf"))
        cuts = tl.load(floats_ptr + 4 * SPLITS + columns)
        counts = tl.sum(counts_SC, axis=0)
        weights = tl.sum(weights_SC, axis=0)
        total = tl.sum(tl.where(columns == CUTS - 1, weights, 0.0), axis=0)

        # Above the last cut is everything. Of rows with top-k the k-th must lie above the cut: the other filters choose
        # among what it keeps. Elsewhere top-p ends above the cut if enough weight is there, a little more for rounding.
        # Below top + log(min_p) nothing is kept; but top-p after top-k also needs the weight that min-p drops.
        weighed = (top_p < 1.0) & unlimited
        bounded = (min_p > 0.0) & (unlimited | (top_p >= 1.0))
        least_count = tl.where(limited, top_k, 2147483647)
        least_weight = tl.where(weighed, top_p * total * (1.0 + 1e-6), float("inf"))
        smallest = tl.max(tops, axis=0) + tl.log(tl.maximum(min_p, 1e-38)) - 1e-3
        smallest = tl.where(bounded, smallest, float("-inf"))
        fits = (columns == CUTS - 1) | (counts >= least_count) | (weights >= least_weight) | (cuts <= smallest)
        chosen = tl.min(tl.where(fits & (counts <= CAPACITY), columns, CUTS), axis=0)
        if split == 0:
            tl.store(ints_ptr + SPLITS + CHOSEN_AT, chosen)
            tl.store(ints_ptr + SPLITS + HELD_AT, tl.sum(tl.where(columns == chosen, counts, 0), axis=0))
            tl.store(floats_ptr + 4 * SPLITS + TOTAL_AT, total)
        if chosen < CUTS:
            of_cut = tl.sum(tl.where(columns[None, :] == chosen, counts_SC, 0), axis=1)
            if tl.sum(tl.where(splits == split, of_cut, 0), axis=0) > 0:
                begin = tl.sum(tl.where(splits < split, of_cut, 0), axis=0)
                places = split * BLOCK + tl.arange(0, BLOCK)
                x = load_scaled(logits_ptr, allowed_row, places, size, tl.load(temperature_ptr + row))
                above = x >= tl.load(floats_ptr + 4 * SPLITS + chosen)
                to = begin + tl.cumsum(above.to(tl.int32), axis=0) - 1
                tl.store(floats_ptr + 4 * SPLITS + WEIGHTS_AT + CUTS * SPLITS + to, x, mask=above)
                tl.store(ints_ptr + SPLITS + COUNTS_AT + CUTS * SPLITS + to, places, mask=above)
