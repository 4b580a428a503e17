"""Evaluation without logits in memory: the product of the output layer and its reduction in one Triton kernel.

A program owns a tile of rows and `TILES` neighbouring tiles of the vocabulary. For each it forms a tile of logits in
fp32, adds the bias, caps, and takes it into a running maximum and sum of exponentials per row; it writes these two, the
target's logit where it met it, and where wanted the sum of the logits. A second kernel merges the parts of each row in
the order of the vocabulary, so that the bits repeat, and writes the loss and the log-probability.

    FLOPs 2 N C V; bytes beside hidden and weight: 16 N ceil(V / (COLUMNS TILES))

Programs run in groups of `GROUP` tiles of rows, the vocabulary inside, so that those running at one time share rows and
weights in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.cross_entropy.options import LossOptions
from trine.kernels.cross_entropy.rows import LOWEST, row_loss, tanh
from trine.kernels.language import dot
from trine.kernels.launch import ceil_div, launch, next_power_of_2
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def _logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, row, column, num_rows, vocab_size, width, softcap,
    EVEN: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """fp32 logits of a tile. One that hangs over an edge repeats the last line inside."""
    inner = tl.arange(0, BLOCK_C)
    rows = tl.minimum(tl.arange(0, ROWS), num_rows - 1 - row)
    columns = tl.minimum(tl.arange(0, COLUMNS), vocab_size - 1 - column)
    hidden_places = rows[:, None] * width + inner[None, :]
    weight_places = columns[None, :] * width + inner[:, None]
    hidden_ptr += row.to(tl.int64) * width
    weight_ptr += column.to(tl.int64) * width
    logits = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        if EVEN:
            hidden = tl.load(hidden_ptr + start + hidden_places)
            logits = dot(hidden, tl.load(weight_ptr + start + weight_places), logits)
        else:
            left = width - start
            hidden = tl.load(hidden_ptr + start + hidden_places, mask=inner[None, :] < left, other=0.0)
            inside = inner[:, None] < left
            logits = dot(hidden, tl.load(weight_ptr + start + weight_places, mask=inside, other=0.0), logits)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + column + columns).to(tl.float32)[None, :]
    if CAPPED:
        logits = tanh(logits / softcap) * softcap
    return logits


@triton.jit
def linear_cross_entropy_parts_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    tops_ptr,
    totals_ptr,
    picked_ptr,
    sums_ptr,
    num_rows,
    vocab_size,
    width,
    softcap,
    EVEN: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
):
    """The statistics of a tile of rows over a part of the vocabulary; results are [parts, N]."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    num_parts = tl.cdiv(vocab_size, COLUMNS * TILES)
    program = tl.program_id(0)
    group = program // (GROUP * num_parts)
    within = program % (GROUP * num_parts)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row = (group * GROUP + within % size) * ROWS
    part = within // size
    rows = tl.arange(0, ROWS)
    in_row = rows < num_rows - row
    # What a target out of range picks does not matter: its row is NaN in the end.
    target = tl.load(targets_ptr + row + rows, mask=in_row, other=-1).to(tl.int32)
    top = tl.full([ROWS], LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    picked = tl.zeros([ROWS], dtype=tl.float32)
    plain_sum = tl.zeros([ROWS], dtype=tl.float32)
    first = part * (COLUMNS * TILES)
    for tile in range(tl.minimum(tl.cdiv(vocab_size - first, COLUMNS), TILES)):
        column = first + tile * COLUMNS
        logits = _logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, row, column, num_rows, vocab_size, width, softcap,
            EVEN, CAPPED, ROWS, COLUMNS, BLOCK_C,
        )  # fmt: skip
        columns = tl.arange(0, COLUMNS)[None, :]
        inside = columns < vocab_size - column
        picked += tl.sum(tl.where(columns == (target - column)[:, None], logits, 0.0), axis=1)
        if sums_ptr is not None:
            plain_sum += tl.sum(tl.where(inside, logits, 0.0), axis=1)
        logits = tl.where(inside, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        top = higher
    place = part.to(tl.int64) * num_rows + row + rows
    tl.store(tops_ptr + place, top, mask=in_row)
    tl.store(totals_ptr + place, total, mask=in_row)
    tl.store(picked_ptr + place, picked, mask=in_row)
    if sums_ptr is not None:
        tl.store(sums_ptr + place, plain_sum, mask=in_row)


@triton.jit
def linear_cross_entropy_merge_kernel(
    tops_ptr,
    totals_ptr,
    picked_ptr,
    sums_ptr,
    targets_ptr,
    losses_ptr,
    log_probs_ptr,
    num_rows,
    num_parts,
    vocab_size,
    ignore_index,
    label_smoothing,
    z_loss,
    Z_LOSS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss and log-probability of a block of rows. A target out of range makes the row NaN."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = rows < num_rows
    target = tl.load(targets_ptr + rows, mask=in_row, other=ignore_index)
    top = tl.full([ROWS], LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    picked = tl.zeros([ROWS], dtype=tl.float32)
    plain_sum = tl.zeros([ROWS], dtype=tl.float32)
    place = rows.to(tl.int64)
    for _ in range(num_parts):
        other_top = tl.load(tops_ptr + place, mask=in_row, other=0.0)
        other_total = tl.load(totals_ptr + place, mask=in_row, other=1.0)
        higher = tl.maximum(top, other_top)
        total = total * tl.exp(top - higher) + other_total * tl.exp(other_top - higher)
        top = higher
        picked += tl.load(picked_ptr + place, mask=in_row, other=0.0)
        if sums_ptr is not None:
            plain_sum += tl.load(sums_ptr + place, mask=in_row, other=0.0)
        place += num_rows
    lse = tl.where((target >= 0) & (target < vocab_size), top + tl.log(total), float("nan"))
    valid = target != ignore_index
    mean = plain_sum / vocab_size
    loss = row_loss(lse, picked, mean, z_loss, label_smoothing, Z_LOSS, sums_ptr is not None)
    tl.store(losses_ptr + rows, tl.where(valid, loss, 0.0), mask=in_row)
    tl.store(log_probs_ptr + rows, tl.where(valid, picked - lse, 0.0), mask=in_row)


# --- configurations ---------------------------------------------------------------------------------------------------


def shared_estimate(config: Config, dtype: torch.dtype) -> int:
    """Bytes of shared memory that the pipelined loop holds at most."""
    blocks = config.blocks
    return config.num_stages * (blocks["ROWS"] + blocks["COLUMNS"]) * blocks["BLOCK_C"] * dtype.itemsize


def _config(shape: Shape, dtype: torch.dtype, target: Target, blocks: tuple[int, int, int], warps: int) -> Config:
    """With as many stages, up to four, as fit in shared memory, and about 16 programs for each multiprocessor."""
    rows, columns, inner = blocks
    sizes = {"ROWS": rows, "COLUMNS": columns, "BLOCK_C": inner, "GROUP": 32}
    stages = (target.shared_bytes - 16 * 1024) // shared_estimate(Config(sizes, warps, 1), dtype)
    programs = ceil_div(max(1, shape["N"]), rows) * ceil_div(shape["V"], columns)
    tiles = next_power_of_2(min(32, programs // (16 * target.num_sms)))
    return Config({**sizes, "TILES": tiles}, warps, max(1, min(2 if target.is_amd else 4, stages)))


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"ROWS": 16, "COLUMNS": 16, "BLOCK_C": 16, "GROUP": 2, "TILES": 2})
    # wgmma and tcgen05 want 64 rows; fewer are bound by reading the weights anyway.
    fewest = 64 if target.arch in ("sm_90", "sm_100") else 16
    rows = max(fewest, next_power_of_2(min(shape["N"], 128)))
    if target.is_amd:
        return _config(shape, dtype, target, (rows, 64, 32), 4)
    if rows < 128:
        return _config(shape, dtype, target, (rows, 128, 64), 4)
    # 256 columns leave registers for the plain reduction only, and none to spare on sm_80.
    columns = 128 if target.arch == "sm_80" or shape["exact_extras"] else 256
    return _config(shape, dtype, target, (128, columns, 64), 8)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        _config(shape, dtype, target, (rows, columns, 32 if target.is_amd else 64), warps)
        for rows in (16, 32, 64, 128, 256)
        for columns in (64, 128, 256)
        for warps in (4, 8)
        if rows <= 2 * max(16, shape["N"]) and 8 * 32 * warps <= rows * columns <= 128 * 32 * warps
    ]


PARTS = Tunable("linear_cross_entropy_parts", _rule, _candidates)
_MERGE = Config({"ROWS": 128}, num_warps=4)
_MERGE_INTERPRETED = Config({"ROWS": 16})


# --- launchers --------------------------------------------------------------------------------------------------------


def launch_parts(
    hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, targets_N: Tensor, options: LossOptions
) -> dict[str, Tensor | None]:
    """The statistics of the parts of the vocabulary, [parts, N], of contiguous tensors of one dtype."""
    num_rows, width = hidden_NC.shape
    vocab_size = weight_VC.shape[0]
    smoothed, capped = options.label_smoothing > 0, options.softcap is not None
    extras = int(smoothed or capped)
    config = PARTS.pick(hidden_NC.dtype, target_of(hidden_NC), N=num_rows, V=vocab_size, C=width, exact_extras=extras)
    blocks = config.blocks
    num_parts = ceil_div(vocab_size, blocks["COLUMNS"] * blocks["TILES"])
    parts = [hidden_NC.new_empty(num_parts, num_rows, dtype=torch.float32) for _ in range(3 + smoothed)]
    sums = parts[3] if smoothed else None
    statistics = {"tops_ptr": parts[0], "totals_ptr": parts[1], "picked_ptr": parts[2], "sums_ptr": sums}
    arguments = {
        **statistics,
        "hidden_ptr": hidden_NC,
        "weight_ptr": weight_VC,
        "bias_ptr": bias_V,
        "targets_ptr": targets_N,
        "num_rows": num_rows,
        "vocab_size": vocab_size,
        "width": width,
        "softcap": options.softcap or 0.0,
        "EVEN": width % blocks["BLOCK_C"] == 0,
        "CAPPED": capped,
    }
    launch(linear_cross_entropy_parts_kernel, (ceil_div(num_rows, blocks["ROWS"]) * num_parts,), config, arguments)
    return statistics


def launch_merge(
    statistics: dict[str, Tensor | None], targets_N: Tensor, vocab_size: int, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Losses and log-probabilities of the rows, fp32 [N], from what `launch_parts` gave."""
    tops = statistics["tops_ptr"]
    assert tops is not None
    num_parts, num_rows = tops.shape
    losses_N, log_probs_N = (tops.new_empty(num_rows) for _ in range(2))
    arguments = {
        **statistics,
        "targets_ptr": targets_N,
        "losses_ptr": losses_N,
        "log_probs_ptr": log_probs_N,
        "num_rows": num_rows,
        "num_parts": num_parts,
        "vocab_size": vocab_size,
        "ignore_index": options.ignore_index,
        "label_smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "Z_LOSS": options.z_loss > 0,
    }
    merge = _MERGE_INTERPRETED if target_of(targets_N).interpreted else _MERGE
    launch(linear_cross_entropy_merge_kernel, (ceil_div(num_rows, merge.blocks["ROWS"]),), merge, arguments)
    return losses_N, log_probs_N
