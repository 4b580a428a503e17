"""The grouped matrix product y[r] = x[row of r] W[e]^T + b[e] for the rows r of each expert e, and its tile loop.

A program owns a tile of rows of one expert (see `groups.tile_list`) and of columns. The rows of x are fetched through
the list of pairs where x holds tokens, so tokens are never copied into grouped order. For the gradient of the input the
weights are read transposed, and a second product (of the other projection) is added in the same accumulator.

Shapes: P pairs in grouped order, E experts, C inner size, F columns. 2 P C F operations; bytes of b-byte numbers,
beside what does not fit in the L2 cache: b (P C + P F + E C F).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.mlp.projection import _tile_of as tile_of
from trine.kernels.moe.configs import MATMUL
from trine.kernels.moe.groups import Groups, tile_list
from trine.kernels.target import target_of
from trine.kernels.tuning import Config


@triton.jit
def source_rows(pair_ptr, row, end, ROWS: tl.constexpr, NUM_SLOTS: tl.constexpr):
    """Where the rows of a tile are in x: the tokens of their pairs, or the rows themselves without pairs.

    A tile that hangs over the end of its expert repeats the last row.
    """
    rows = tl.minimum(row + tl.arange(0, ROWS), end - 1)
    if pair_ptr is not None:
        rows = tl.load(pair_ptr + rows) // NUM_SLOTS
    return rows.to(tl.int64)


@triton.jit
def _add_product(
    total,
    x_ptr,
    sources,
    weight_ptr,
    column,
    num_columns,
    width,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total + x W^T of a tile; W of one expert is [columns, width], or [width, columns] where TRANSPOSED."""
    inner = tl.arange(0, BLOCK_K)
    x_places = sources[:, None] * width + inner[None, :]
    columns = tl.arange(0, COLUMNS)
    if TRANSPOSED:
        weight_ptr += column
        weight_places = inner[:, None] * num_columns + columns[None, :]
        wanted = columns[None, :] < num_columns - column
    else:
        weight_ptr += column.to(tl.int64) * width
        # What hangs over repeats the last column: only the end of the inner size needs a mask.
        weight_places = tl.minimum(columns, num_columns - 1 - column)[None, :] * width + inner[:, None]
    for start in range(0, width, BLOCK_K):
        left = width - start
        x = tl.load(x_ptr + x_places, mask=None if EVEN else inner[None, :] < left, other=None if EVEN else 0.0)
        if TRANSPOSED:
            inside = wanted if EVEN else wanted & (inner[:, None] < left)
            weight = tl.load(weight_ptr + weight_places, mask=inside, other=0.0)
            weight_ptr += BLOCK_K * num_columns
        else:
            inside = None if EVEN else inner[:, None] < left
            weight = tl.load(weight_ptr + weight_places, mask=inside, other=None if EVEN else 0.0)
            weight_ptr += BLOCK_K
        total = dot(x, weight, total)
        x_ptr += BLOCK_K
    return total


@triton.jit
def grouped_matmul_kernel(
    x_ptr,
    weight_ptr,
    other_x_ptr,
    other_weight_ptr,
    bias_ptr,
    y_ptr,
    pair_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_experts,
    num_columns,
    width,
    weight_stride,
    other_stride,
    bias_stride,
    NUM_SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of y."""
    tile, column = tile_of(tl.program_id(0), num_tiles, num_columns, 1, COLUMNS, GROUP)
    expert = tl.load(tile_ptr + tile)
    if expert >= num_experts:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(offset_ptr + expert + 1)
    sources = source_rows(pair_ptr, row, end, ROWS, NUM_SLOTS)
    y = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    weight_ptr += expert.to(tl.int64) * weight_stride
    y = _add_product(
        y, x_ptr, sources, weight_ptr, column, num_columns, width, TRANSPOSED, EVEN, COLUMNS, BLOCK_K
    )  # fmt: skip
    if other_x_ptr is not None:
        other_weight_ptr += expert.to(tl.int64) * other_stride
        y = _add_product(
            y, other_x_ptr, sources, other_weight_ptr, column, num_columns, width, TRANSPOSED, EVEN, COLUMNS, BLOCK_K
        )  # fmt: skip
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < end - row) & (columns < num_columns - column)
    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * bias_stride + column
        y += tl.load(bias_ptr + columns, mask=columns < num_columns - column, other=0.0).to(tl.float32)
    first, places = row.to(tl.int64) * num_columns + column, rows * num_columns + columns
    tl.store(y_ptr + first + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _clear_kernel(y_ptr, offset_ptr, num_rows, num_columns, num_experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the rows of no expert."""
    columns = tl.arange(0, COLUMNS)
    zeros = tl.zeros([ROWS, COLUMNS], dtype=y_ptr.dtype.element_ty)
    first = tl.load(offset_ptr + num_experts)
    for start in range(first + tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        places = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
        for column in range(0, num_columns, COLUMNS):
            inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns - column)
            tl.store(y_ptr + column + places, zeros, mask=inside)


def by_expert(weight: Tensor) -> Tensor:
    """A tensor whose experts are contiguous each, however far apart: halves of a fused tensor stay in place."""
    one = weight[0]
    return weight if one.is_contiguous() and weight.stride(0) >= one.numel() else weight.contiguous()


def product_arguments(groups: Groups, tiles_2M: Tensor, gather: bool) -> dict[str, object]:
    """What every kernel on tiles takes."""
    return {
        "pair_ptr": groups.pair_P if gather else None,
        "offset_ptr": groups.offset,
        "tile_ptr": tiles_2M,
        "num_tiles": tiles_2M.shape[1],
        "num_experts": groups.num_experts,
        "NUM_SLOTS": groups.num_slots,
    }


def launch_product(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    *,
    gather: bool,
    transposed: bool = False,
    bias_EF: Tensor | None = None,
    other: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y_PF in the dtype of x; the rows of no expert are left as they are found in memory.

    x is contiguous, [N, C] with `gather` (a row for each token) or [P, C] in grouped order; `weight` is [E, F, C], or
    [E, C, F] if `transposed`; `other` is a second x and weight of the same shapes, whose product is added.
    """
    num_pairs = len(groups.pair_P)
    width, num_columns = x.shape[1], weight.shape[2] if transposed else weight.shape[1]
    y_PF = x.new_empty(num_pairs, num_columns, dtype=result_dtype(x.dtype))
    target = target_of(x)
    config = MATMUL[transposed].pick(x.dtype, target, P=num_pairs, E=groups.num_experts, C=width, F=num_columns)
    tiles_2M = tile_list(groups, config.blocks["ROWS"])
    weight = by_expert(weight)
    other_weight = None if other is None else by_expert(other[1])
    bias_EF = None if bias_EF is None else by_expert(bias_EF)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "other_x_ptr": None if other is None else other[0],
        "other_weight_ptr": other_weight,
        "bias_ptr": bias_EF,
        "y_ptr": y_PF,
        **product_arguments(groups, tiles_2M, gather),
        "num_columns": num_columns,
        "width": width,
        "weight_stride": weight.stride(0),
        "other_stride": 0 if other_weight is None else other_weight.stride(0),
        "bias_stride": 0 if bias_EF is None else bias_EF.stride(0),
        "TRANSPOSED": transposed,
        "EVEN": width % config.blocks["BLOCK_K"] == 0,
    }
    grid = (tiles_2M.shape[1] * ceil_div(num_columns, config.blocks["COLUMNS"]),)
    launch(grouped_matmul_kernel, grid, config, arguments)
    return rounded(y_PF, x.dtype)


def launch_clear(y_PF: Tensor, groups: Groups) -> None:
    """Set the rows of no expert to zero."""
    num_rows, num_columns = y_PF.shape
    arguments = {
        "y_ptr": y_PF,
        "offset_ptr": groups.offset,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "num_experts": groups.num_experts,
    }
    config = Config({"ROWS": 4, "COLUMNS": 256}, num_warps=4, num_stages=1)
    grid = (min(ceil_div(num_rows, config.blocks["ROWS"]), target_of(y_PF).num_sms),)
    launch(_clear_kernel, grid, config, arguments)
