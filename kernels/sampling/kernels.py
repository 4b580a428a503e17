"""What the sampling kernels share, and the kernel of penalties and biases.

Rows are cut into splits of BLOCK logits. Between the launches of `sample` a row keeps, in one fp32 and one int32 array,
at fixed places (SPLITS: splits rounded up to a power of two):

    fp32    largest raw logit, sum of exp above it, largest allowed logit (scaled), sum of exp above it: SPLITS each;
            16 cuts; the weight above all of them; per split the weight above each cut; the candidates' values
    int32   the first token with the largest allowed logit: SPLITS; state, chosen cut, number of candidates;
            per split the number above each cut; the candidates' tokens
"""

from __future__ import annotations

import triton
import triton.language as tl

CUTS = tl.constexpr(16)
# Begins of what follows the numbers of the splits, from there on.
TOTAL_AT = tl.constexpr(16)
WEIGHTS_AT = tl.constexpr(32)
CHOSEN_AT = tl.constexpr(1)
HELD_AT = tl.constexpr(2)
COUNTS_AT = tl.constexpr(16)


def scratch_sizes(splits: int, capacity: int) -> tuple[int, int]:
    """fp32 and int32 numbers that a row keeps."""
    return 4 * splits + 32 + 16 * splits + capacity, splits + 16 + 16 * splits + capacity


@triton.jit
def ordered(x):
    """fp32 as int32 with the same order (-0.0 just below 0.0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_logits(logits_ptr, allowed_ptr, places, size):
    """Logits as fp32, -inf past the end and where the bit of the token in `allowed` is 0."""
    inside = places < size
    x = tl.load(logits_ptr + places, mask=inside, other=float("-inf")).to(tl.float32)
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + places // 32, mask=inside, other=0)
        x = tl.where((words >> (places % 32)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def load_scaled(logits_ptr, allowed_ptr, places, size, temperature):
    """Logits divided by the temperature, where that is above 0."""
    x = load_logits(logits_ptr, allowed_ptr, places, size)
    return tl.where(temperature > 0.0, x / tl.where(temperature > 0.0, temperature, 1.0), x)


@triton.jit
def store_token(
    logits_ptr, tokens_ptr, log_probs_ptr, floats_ptr, row, token, num_splits, SPLITS: tl.constexpr
):  # fmt: skip
    """The token of a row and its log-probability under the row as it was given; -1 gives NaN."""
    log_prob = float("nan")
    if token >= 0:
        splits = tl.arange(0, SPLITS)
        tops = tl.load(floats_ptr + splits, mask=splits < num_splits, other=float("-inf"))
        sums = tl.load(floats_ptr + SPLITS + splits, mask=splits < num_splits, other=0.0)
        top = tl.max(tops, axis=0)
        chosen = tl.load(logits_ptr + token).to(tl.float32)
        log_prob = chosen - top - tl.log(tl.sum(sums * tl.exp(tops - top), axis=0))
    tl.store(tokens_ptr + row, token)
    tl.store(log_probs_ptr + row, log_prob)


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
