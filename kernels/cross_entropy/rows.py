"""The Triton kernel of a cross-entropy over logits in memory: one program per row.

The first pass reads the row and keeps, in each lane, a maximum and a sum of exponentials (the online softmax); the
second reads it again, mostly from the L2 cache, and writes the gradient, over the logits where the caller says so.
Where the log-sum-exp is known the first pass is left out; where no gradient is wanted, the second.

    p = exp(s - lse)      dlogits = (p (1 + 2 z lse) - e / V - (1 - e) onehot(target)) (1 - (s / softcap)^2) scale

Bytes for V numbers of b bytes: V b read for the statistics, V b read (at most) and V b written for the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.cross_entropy.options import LossOptions
from trine.kernels.launch import launch, next_power_of_2
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

# Below every number but -inf, and finite: differences from it are never NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tanh(x):
    """Without a library call, relative error about 4e-7: a Taylor polynomial near 0, where the exponential cancels."""
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(square < 0.0625, near, far)


@triton.jit
def observe(x, top, total):
    """Take x into a running maximum and the sum of exponentials below it, each lane on its own, by one exponential."""
    below = tl.exp(-tl.abs(x - top))
    return tl.maximum(top, x), tl.where(x > top, total * below + 1.0, total + below)


@triton.jit
def log_sum_exp(top, total):
    """Of all lanes together."""
    highest = tl.max(top, axis=0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit
def row_loss(lse, picked, mean, z_loss, label_smoothing, Z_LOSS: tl.constexpr, SMOOTHED: tl.constexpr):
    """The loss of a row from its log-sum-exp, the target's logit and the mean logit."""
    loss = lse - picked
    if SMOOTHED:
        loss += label_smoothing * (picked - mean)
    if Z_LOSS:
        loss += z_loss * lse * lse
    return loss


@triton.jit
def _gradient(
    x, columns, target, lse, scale, z_factor, label_smoothing, vocab_size, softcap,
    SMOOTHED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dlogits of a block of a row."""
    if CAPPED:
        ratio = tanh(x / softcap)
        x = ratio * softcap
    gradient = tl.exp(x - lse) * z_factor
    if SMOOTHED:
        gradient -= label_smoothing / vocab_size
    gradient = tl.where(columns == target, gradient - (1.0 - label_smoothing), gradient)
    if CAPPED:
        gradient *= 1.0 - ratio * ratio
    return gradient * scale


@triton.jit
def cross_entropy_rows_kernel(
    logits_ptr,
    dlogits_ptr,
    targets_ptr,
    losses_ptr,
    log_probs_ptr,
    lse_ptr,
    scales_ptr,
    vocab_size,
    logits_stride,
    dlogits_stride,
    scales_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    KNOWN: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row. KNOWN: lse is read, not written, and no loss is wanted. A target out of range makes the row NaN."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    logits_ptr += row.to(tl.int64) * logits_stride
    if dlogits_ptr is not None:
        dlogits_ptr += row.to(tl.int64) * dlogits_stride
    lanes = tl.arange(0, BLOCK_V)
    # Whole blocks need no mask, which would keep rows of odd length from being read in wide loads.
    whole = vocab_size // BLOCK_V * BLOCK_V
    if target == ignore_index:
        if not KNOWN:
            tl.store(losses_ptr + row, 0.0)
            tl.store(log_probs_ptr + row, 0.0)
            if lse_ptr is not None:
                tl.store(lse_ptr + row, 0.0)
        if dlogits_ptr is not None:
            zeros = tl.zeros([BLOCK_V], dtype=dlogits_ptr.dtype.element_ty)
            for start in range(0, whole, BLOCK_V):
                tl.store(dlogits_ptr + start + lanes, zeros)
            tl.store(dlogits_ptr + whole + lanes, zeros, mask=whole + lanes < vocab_size)
    else:
        inside = (target >= 0) & (target < vocab_size)
        if KNOWN:
            lse = tl.load(lse_ptr + row)
        else:
            picked = tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32)
            top = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
            total = tl.zeros([BLOCK_V], dtype=tl.float32)
            plain_sum = tl.zeros([BLOCK_V], dtype=tl.float32)
            for start in range(0, whole, BLOCK_V):
                x = tl.load(logits_ptr + start + lanes, eviction_policy="evict_last").to(tl.float32)
                if CAPPED:
                    x = tanh(x / softcap) * softcap
                top, total = observe(x, top, total)
                if SMOOTHED:
                    plain_sum += x
            if whole < vocab_size:
                left = whole + lanes < vocab_size
                x = tl.load(logits_ptr + whole + lanes, mask=left, other=0.0).to(tl.float32)
                if CAPPED:
                    x = tanh(x / softcap) * softcap
                top, total = observe(tl.where(left, x, float("-inf")), top, total)
                if SMOOTHED:
                    plain_sum += x
            if CAPPED:
                picked = tanh(picked / softcap) * softcap
            lse = tl.where(inside, log_sum_exp(top, total), float("nan"))
            mean = tl.sum(plain_sum, axis=0) / vocab_size
            loss = row_loss(lse, picked, mean, z_loss, label_smoothing, Z_LOSS, SMOOTHED)
            tl.store(losses_ptr + row, loss)
            tl.store(log_probs_ptr + row, picked - lse)
            if lse_ptr is not None:
                tl.store(lse_ptr + row, lse)
        if dlogits_ptr is not None:
            scale = 1.0
            if scales_ptr is not None:
                scale = tl.load(scales_ptr + row.to(tl.int64) * scales_stride).to(tl.float32)
            z_factor = 1.0
            if Z_LOSS:
                z_factor = 1.0 + 2.0 * z_loss * lse
            for start in range(0, whole, BLOCK_V):
                x = tl.load(logits_ptr + start + lanes, eviction_policy="evict_first").to(tl.float32)
                gradient = _gradient(
                    x, start + lanes, target, lse, scale, z_factor, label_smoothing, vocab_size, softcap,
                    SMOOTHED, CAPPED,
                )  # fmt: skip
                tl.store(dlogits_ptr + start + lanes, gradient.to(dlogits_ptr.dtype.element_ty))
            if whole < vocab_size:
                left = whole + lanes < vocab_size
                x = tl.load(logits_ptr + whole + lanes, mask=left, other=0.0).to(tl.float32)
                gradient = _gradient(
                    x, whole + lanes, target, lse, scale, z_factor, label_smoothing, vocab_size, softcap,
                    SMOOTHED, CAPPED,
                )  # fmt: skip
                tl.store(dlogits_ptr + whole + lanes, gradient.to(dlogits_ptr.dtype.element_ty), mask=left)


# --- configurations ---------------------------------------------------------------------------------------------------


def row_config(vocab_size: int, target: Target, bytes_each: int, each: int, threads: int = 512) -> Config:
    """With `each` numbers for each thread, of up to 16 KiB in all; AMD's lanes come 64 to a warp."""
    widest = 256 * each if target.is_amd else min(threads * each, 16384 // bytes_each)
    block = min(widest, max(1024, next_power_of_2(vocab_size)))
    lanes = 64 if target.is_amd else 32
    return Config({"BLOCK_V": block}, num_warps=max(4, block // (lanes * each)))


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    """Wide blocks, so that enough bytes are under way; half as wide where odd rows need an address for each number."""
    if target.interpreted:
        return Config({"BLOCK_V": 32})
    # 512 threads of 16 numbers spill with triton 3.6.
    return row_config(shape["V"], target, dtype.itemsize, *((8, 512) if shape["V"] % 16 else (16, 256)))


def row_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    """Blocks from 1024 to 16384 numbers, 8 to 32 for each thread."""
    return [
        Config({"BLOCK_V": block}, num_warps=warps)
        for block in (1024, 2048, 4096, 8192, 16384)
        for warps in (4, 8, 16)
        if block <= max(1024, 2 * shape["V"]) and 8 <= block // (32 * warps) <= 32
    ]


ROWS = Tunable("cross_entropy_rows", _rule, row_candidates)


# --- launcher ---------------------------------------------------------------------------------------------------------


def launch_rows(
    logits_NV: Tensor,
    targets_N: Tensor,
    options: LossOptions,
    *,
    dlogits_NV: Tensor | None = None,
    losses_N: Tensor | None = None,
    log_probs_N: Tensor | None = None,
    lse_N: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Fill losses, log-probabilities and lse (fp32 [N]), and dlogits (which may be the logits).

    Without losses, lse is taken as known. `scales`, one number or [N], multiply the gradient. Rows may be apart but
    not their numbers.
    """
    config = ROWS.pick(logits_NV.dtype, target_of(logits_NV), V=logits_NV.shape[1])
    arguments = {
        "logits_ptr": logits_NV,
        "dlogits_ptr": dlogits_NV,
        "targets_ptr": targets_N,
        "losses_ptr": losses_N,
        "log_probs_ptr": log_probs_N,
        "lse_ptr": lse_N,
        "scales_ptr": scales,
        "vocab_size": logits_NV.shape[1],
        "logits_stride": logits_NV.stride(0),
        "dlogits_stride": 0 if dlogits_NV is None else dlogits_NV.stride(0),
        "scales_stride": scales.stride(0) if scales is not None and scales.dim() else 0,
        "ignore_index": options.ignore_index,
        "label_smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "softcap": options.softcap or 0.0,
        "KNOWN": losses_N is None,
        "SMOOTHED": options.label_smoothing > 0,
        "Z_LOSS": options.z_loss > 0,
        "CAPPED": options.softcap is not None,
    }
    launch(cross_entropy_rows_kernel, (logits_NV.shape[0],), config, arguments)
