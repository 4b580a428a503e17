"""Gradients of the weights and biases of grouped products: sums over the rows of each expert.

    dW[e] = sum over rows r of e of left[r]^T right[r]        db[e] = sum over rows r of e of scale[r] left[r]

A program owns a tile of one expert's gradient and walks over the rows of its expert in their order, so the bits repeat
without atomics; experts without rows get zeros. Either operand may be fetched through the list of pairs.

Shapes: P rows in grouped order, E experts, A columns of left, B columns of right. 2 P A B operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.mlp.projection import _tile_of as tile_of
from trine.kernels.moe.configs import WEIGHT_GRADIENT
from trine.kernels.moe.groups import Groups
from trine.kernels.target import target_of
from trine.kernels.tuning import Config


@triton.jit
def _weight_gradient_kernel(
    left_ptr,
    right_ptr,
    dweight_ptr,
    left_pair_ptr,
    right_pair_ptr,
    offset_ptr,
    num_left,
    num_right,
    NUM_SLOTS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of one expert's gradient [A, B]."""
    expert = tl.program_id(1)
    first_left, first_right = tile_of(tl.program_id(0), num_left, num_right, LEFT, RIGHT, GROUP)
    lefts, rights = tl.arange(0, LEFT), tl.arange(0, RIGHT)
    left_inside, right_inside = lefts < num_left - first_left, rights < num_right - first_right
    left_ptr += first_left
    right_ptr += first_right
    end = tl.load(offset_ptr + expert + 1)
    total = tl.zeros([LEFT, RIGHT], dtype=tl.float32)
    for start in range(tl.load(offset_ptr + expert), end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        left_rows, right_rows = rows, rows
        if left_pair_ptr is not None:
            left_rows = tl.load(left_pair_ptr + rows, mask=inside, other=0) // NUM_SLOTS
        if right_pair_ptr is not None:
            right_rows = tl.load(right_pair_ptr + rows, mask=inside, other=0) // NUM_SLOTS
        left_places = left_rows[None, :].to(tl.int64) * num_left + lefts[:, None]
        right_places = right_rows[:, None].to(tl.int64) * num_right + rights[None, :]
        left = tl.load(left_ptr + left_places, mask=inside[None, :] & left_inside[:, None], other=0.0)
        right = tl.load(right_ptr + right_places, mask=inside[:, None] & right_inside[None, :], other=0.0)
        total = dot(left, right, total)
    dweight_ptr += expert.to(tl.int64) * num_left * num_right + first_left.to(tl.int64) * num_right + first_right
    places = lefts[:, None] * num_right + rights[None, :]
    inside = left_inside[:, None] & right_inside[None, :]
    tl.store(dweight_ptr + places, total.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gradient_kernel(
    left_ptr,
    scale_ptr,
    dbias_ptr,
    pair_ptr,
    offset_ptr,
    num_left,
    NUM_SLOTS: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of one expert's gradient, fp32 [A]; rows may be scaled by the weight of their pair."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = columns < num_left
    end = tl.load(offset_ptr + expert + 1)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(tl.load(offset_ptr + expert), end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        pairs = tl.load(pair_ptr + rows, mask=inside, other=0)
        sources = pairs // NUM_SLOTS if GATHER else rows
        places = sources[:, None].to(tl.int64) * num_left + columns[None, :]
        left = tl.load(left_ptr + places, mask=inside[:, None] & wanted[None, :], other=0.0).to(tl.float32)
        if scale_ptr is not None:
            left *= tl.load(scale_ptr + pairs, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += left
    sums = tl.sum(total, axis=0)
    tl.store(dbias_ptr + expert.to(tl.int64) * num_left + columns, sums, mask=wanted)


def launch_weight_gradient(
    left: Tensor,
    right: Tensor,
    groups: Groups,
    dtype: torch.dtype,
    *,
    gather_left: bool = False,
    gather_right: bool = False,
) -> Tensor:
    """[E, A, B] in `dtype`, rounded once; left and right are contiguous rows of one dtype, of tokens if gathered."""
    num_left, num_right = left.shape[1], right.shape[1]
    dweight = left.new_empty(groups.num_experts, num_left, num_right, dtype=result_dtype(dtype))
    sizes = {"P": len(groups.pair_P), "E": groups.num_experts, "C": num_right, "F": num_left}
    sizes["exact_gathered"] = int(gather_left or gather_right)
    config = WEIGHT_GRADIENT.pick(left.dtype, target_of(left), **sizes)
    arguments = {
        "left_ptr": left,
        "right_ptr": right,
        "dweight_ptr": dweight,
        "left_pair_ptr": groups.pair_P if gather_left else None,
        "right_pair_ptr": groups.pair_P if gather_right else None,
        "offset_ptr": groups.offset,
        "num_left": num_left,
        "num_right": num_right,
        "NUM_SLOTS": groups.num_slots,
    }
    tiles = ceil_div(num_left, config.blocks["LEFT"]) * ceil_div(num_right, config.blocks["RIGHT"])
    launch(_weight_gradient_kernel, (tiles, groups.num_experts), config, arguments)
    return rounded(dweight, dtype)


def launch_bias_gradient(
    left: Tensor, groups: Groups, dtype: torch.dtype, *, gather: bool = False, scale_NK: Tensor | None = None
) -> Tensor:
    """[E, A] in `dtype`."""
    num_left = left.shape[1]
    dbias = left.new_empty(groups.num_experts, num_left, dtype=torch.float32)
    arguments = {
        "left_ptr": left,
        "scale_ptr": scale_NK,
        "dbias_ptr": dbias,
        "pair_ptr": groups.pair_P,
        "offset_ptr": groups.offset,
        "num_left": num_left,
        "NUM_SLOTS": groups.num_slots,
        "GATHER": gather,
    }
    small = target_of(left).interpreted
    config = Config({"ROWS": 16 if small else 32, "COLUMNS": 16 if small else 64}, num_warps=4, num_stages=2)
    launch(_bias_gradient_kernel, (ceil_div(num_left, config.blocks["COLUMNS"]), groups.num_experts), config, arguments)
    return dbias.to(dtype)
