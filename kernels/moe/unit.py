"""The gated unit of every expert on the rows of its tokens: h[r] = act(x[t] Wg[e]^T + bg[e]) * (x[t] Wu[e]^T + bu[e]).

As `mlp/projection.py`, with the tiles of `groups.tile_list`: one loop over C multiplies each piece of x, fetched by
token, with the pieces of both weights; the activation happens on the accumulators, so neither gate nor up is ever in
memory. The backward recomputes them. It takes dh without the weight of the pair, w, and gives, in one epilogue,

    dgate = w dh up act'(gate)    dup = w dh act(gate)    scaled = w h    dw = sum over F of dh h

`scaled` is what the gradient of the down projection multiplies; dw is the gradient of the weight of the pair, here one
sum for each tile of columns, which `pair_weights.py` adds up.

Shapes: P pairs in grouped order (row r is of token t, expert e), E experts, C width, F feed-forward width.
4 P C F operations, forward and backward. Bytes of b-byte numbers: forward b (P C + P F + 2 E C F), backward 3 b P F
more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.mlp.projection import CLAMPED, activate_tile
from trine.kernels.mlp.projection import _tile_of as tile_of
from trine.kernels.moe.configs import GATED_BACKWARD, GATED_FORWARD
from trine.kernels.moe.groups import Groups, tile_list
from trine.kernels.moe.product import product_arguments, source_rows
from trine.kernels.target import target_of
from trine.kernels.tuning import Config


class Projections(NamedTuple):
    """Gate and up projection of all experts, [E, F, C] and [E, F], in one dtype, each expert contiguous."""

    gate_weight: Tensor
    up_weight: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None


@triton.jit
def _project(
    x_ptr,
    sources,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    column,
    num_columns,
    width,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """gate and up of a tile of one expert, fp32."""
    inner = tl.arange(0, BLOCK_K)
    columns = tl.minimum(tl.arange(0, COLUMNS), num_columns - 1 - column)
    x_places = sources[:, None] * width + inner[None, :]
    weight_places = columns[None, :] * width + inner[:, None]
    gate_weight_ptr += column.to(tl.int64) * width
    up_weight_ptr += column.to(tl.int64) * width
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptr + start + x_places)
            gate = dot(x, tl.load(gate_weight_ptr + start + weight_places), gate)
            up = dot(x, tl.load(up_weight_ptr + start + weight_places), up)
        else:
            left = width - start
            inside = inner[:, None] < left
            x = tl.load(x_ptr + start + x_places, mask=inner[None, :] < left, other=0.0)
            gate = dot(x, tl.load(gate_weight_ptr + start + weight_places, mask=inside, other=0.0), gate)
            up = dot(x, tl.load(up_weight_ptr + start + weight_places, mask=inside, other=0.0), up)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + column + columns).to(tl.float32)[None, :]
        up += tl.load(up_bias_ptr + column + columns).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def _limited(gate, up, limit):
    """gpt-oss's gate and up, each within its limits; NaN stays NaN."""
    gate = tl.where(gate > limit, limit, gate)
    return gate, tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@triton.jit
def gated_forward_kernel(
    x_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    h_ptr,
    pair_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_experts,
    num_columns,
    width,
    gate_stride,
    up_stride,
    gate_bias_stride,
    up_bias_stride,
    limit,
    NUM_SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of h."""
    tile, column = tile_of(tl.program_id(0), num_tiles, num_columns, 1, COLUMNS, GROUP)
    expert = tl.load(tile_ptr + tile)
    if expert >= num_experts:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(offset_ptr + expert + 1)
    gate_weight_ptr += expert.to(tl.int64) * gate_stride
    up_weight_ptr += expert.to(tl.int64) * up_stride
    if gate_bias_ptr is not None:
        gate_bias_ptr += expert.to(tl.int64) * gate_bias_stride
        up_bias_ptr += expert.to(tl.int64) * up_bias_stride
    gate, up = _project(
        x_ptr, source_rows(pair_ptr, row, end, ROWS, NUM_SLOTS), gate_weight_ptr, up_weight_ptr, gate_bias_ptr,
        up_bias_ptr, column, num_columns, width, EVEN, ROWS, COLUMNS, BLOCK_K,
    )  # fmt: skip
    if ACTIVATION == CLAMPED:
        gate, up = _limited(gate, up, limit)
        up += 1.0
    h, _ = activate_tile(gate, ACTIVATION)
    h *= up
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < end - row) & (columns < num_columns - column)
    first, places = row.to(tl.int64) * num_columns + column, rows * num_columns + columns
    tl.store(h_ptr + first + places, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    dh_ptr,
    x_ptr,
    pair_weight_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    dgate_ptr,
    dup_ptr,
    scaled_ptr,
    sum_ptr,
    pair_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_pairs,
    num_experts,
    num_columns,
    width,
    gate_stride,
    up_stride,
    gate_bias_stride,
    up_bias_stride,
    limit,
    NUM_SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of dgate, dup and the scaled h, and the sums of dh h over its columns."""
    tile, column = tile_of(tl.program_id(0), num_tiles, num_columns, 1, COLUMNS, GROUP)
    expert = tl.load(tile_ptr + tile)
    if expert >= num_experts:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(offset_ptr + expert + 1)
    gate_weight_ptr += expert.to(tl.int64) * gate_stride
    up_weight_ptr += expert.to(tl.int64) * up_stride
    if gate_bias_ptr is not None:
        gate_bias_ptr += expert.to(tl.int64) * gate_bias_stride
        up_bias_ptr += expert.to(tl.int64) * up_bias_stride
    gate, up = _project(
        x_ptr, source_rows(pair_ptr, row, end, ROWS, NUM_SLOTS), gate_weight_ptr, up_weight_ptr, gate_bias_ptr,
        up_bias_ptr, column, num_columns, width, EVEN, ROWS, COLUMNS, BLOCK_K,
    )  # fmt: skip
    used_gate, used_up = gate, up
    if ACTIVATION == CLAMPED:
        used_gate, limited_up = _limited(gate, up, limit)
        used_up = limited_up + 1.0
    activated, slope = activate_tile(used_gate, ACTIVATION)
    lines = tl.arange(0, ROWS)
    rows, columns = lines[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < end - row) & (columns < num_columns - column)
    first, places = row.to(tl.int64) * num_columns + column, rows * num_columns + columns
    dh = tl.load(dh_ptr + first + places, mask=inside, other=0.0).to(tl.float32)
    pairs = tl.load(pair_ptr + row + lines, mask=lines < end - row, other=0)
    pair_weight = tl.load(pair_weight_ptr + pairs).to(tl.float32)[:, None]
    h = activated * used_up
    products = dh * h
    dh *= pair_weight
    dup = dh * activated
    dgate = dh * used_up * slope
    if ACTIVATION == CLAMPED:
        # Within the limits where limiting changed nothing.
        dup = tl.where(limited_up == up, dup, 0.0)
        dgate = tl.where(used_gate == gate, dgate, 0.0)
    # Rounded before anything is exchanged between threads, so that few registers are held meanwhile.
    scaled = (h * pair_weight).to(scaled_ptr.dtype.element_ty)
    dup = dup.to(dup_ptr.dtype.element_ty)
    dgate = dgate.to(dgate_ptr.dtype.element_ty)
    tl.store(scaled_ptr + first + places, scaled, mask=inside)
    tl.store(dup_ptr + first + places, dup, mask=inside)
    tl.store(dgate_ptr + first + places, dgate, mask=inside)
    if sum_ptr is not None:
        # What hangs over repeats a column, times a dh of zero.
        sum_ptr += (column // COLUMNS).to(tl.int64) * num_pairs + row
        tl.store(sum_ptr + lines, tl.sum(products, axis=1), mask=lines < end - row)


# --- launchers --------------------------------------------------------------------------------------------------------


def launch_gated(
    x_NC: Tensor, projections: Projections, groups: Groups, activation: str, limit: float | None
) -> Tensor:
    """h_PF; the rows of no expert are left as they are found in memory."""
    num_columns, num_pairs = projections.up_weight.shape[1], len(groups.pair_P)
    h_PF = x_NC.new_empty(num_pairs, num_columns, dtype=result_dtype(x_NC.dtype))
    config = GATED_FORWARD.pick(x_NC.dtype, target_of(x_NC), **_sizes(x_NC, projections, groups))
    shared = _arguments(x_NC, projections, groups, config, activation, limit)
    grid = _grid(groups, num_columns, config, shared)
    launch(gated_forward_kernel, grid, config, {"h_ptr": h_PF, **shared})
    return rounded(h_PF, x_NC.dtype)


def launch_gated_backward(
    dh_PF: Tensor,
    x_NC: Tensor,
    weights_NK: Tensor,
    projections: Projections,
    groups: Groups,
    activation: str,
    limit: float | None,
    *,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dgate_PF, dup_PF, the scaled h_PF, and with `sums` fp32 [tiles of columns, P] for `launch_pair_weights`."""
    num_pairs, num_columns = dh_PF.shape
    results = [torch.empty_like(dh_PF, dtype=result_dtype(x_NC.dtype)) for _ in range(3)]
    config = GATED_BACKWARD.pick(x_NC.dtype, target_of(x_NC), **_sizes(x_NC, projections, groups))
    column_tiles = ceil_div(num_columns, config.blocks["COLUMNS"])
    sums_TP = x_NC.new_empty(column_tiles, num_pairs, dtype=torch.float32) if sums else None
    shared = _arguments(x_NC, projections, groups, config, activation, limit)
    arguments = {
        "dh_ptr": dh_PF,
        "pair_weight_ptr": weights_NK,
        **dict(zip(("dgate_ptr", "dup_ptr", "scaled_ptr"), results, strict=True)),
        "sum_ptr": sums_TP,
        "num_pairs": num_pairs,
    }
    launch(gated_backward_kernel, _grid(groups, num_columns, config, shared), config, {**arguments, **shared})
    dgate_PF, dup_PF, scaled_PF = (rounded(result, x_NC.dtype) for result in results)
    return dgate_PF, dup_PF, scaled_PF, sums_TP


def _sizes(x_NC: Tensor, projections: Projections, groups: Groups) -> dict[str, int]:
    wide = projections.up_weight.shape[1]
    return {"P": len(groups.pair_P), "E": groups.num_experts, "C": x_NC.shape[1], "F": wide}


def _arguments(
    x_NC: Tensor, projections: Projections, groups: Groups, config: Config, activation: str, limit: float | None
) -> dict[str, object]:
    gate_weight, up_weight, gate_bias, up_bias = projections
    width = x_NC.shape[1]
    return {
        "x_ptr": x_NC,
        "gate_weight_ptr": gate_weight,
        "up_weight_ptr": up_weight,
        "gate_bias_ptr": gate_bias,
        "up_bias_ptr": up_bias,
        **product_arguments(groups, tile_list(groups, config.blocks["ROWS"]), gather=True),
        "num_columns": up_weight.shape[1],
        "width": width,
        "gate_stride": gate_weight.stride(0),
        "up_stride": up_weight.stride(0),
        "gate_bias_stride": 0 if gate_bias is None else gate_bias.stride(0),
        "up_bias_stride": 0 if up_bias is None else up_bias.stride(0),
        "limit": limit,
        "ACTIVATION": activation,
        "EVEN": width % config.blocks["BLOCK_K"] == 0,
    }


def _grid(groups: Groups, num_columns: int, config: Config, arguments: dict[str, object]) -> tuple[int]:
    num_tiles = arguments["num_tiles"]
    assert isinstance(num_tiles, int)
    return (num_tiles * ceil_div(num_columns, config.blocks["COLUMNS"]),)
