"""The Triton kernels of the feed-forward layer: both projections of a tile, with the activation in the epilogue.

A program owns a tile of [tokens, feed-forward columns]. Its loop over C loads each piece of x once and multiplies it
with the pieces of both weights into two fp32 accumulators (one where there is no gate). What follows happens on the
accumulators: the forward writes h, the backward reads dh and writes dgate, dup and h. Neither gate nor up is ever in
memory.

Programs run in groups of `GROUP` tiles of tokens, columns inside, so that those running at one time share weights and
tokens in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

CLAMPED = tl.constexpr("swiglu_clamped")
# gpt-oss's approximation of GELU: g * sigmoid(1.702 g).
_ALPHA = tl.constexpr(1.702)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate_tile(g, ACTIVATION: tl.constexpr):
    """The activation of g and its derivative there. NaN stays NaN; at 0 relu's derivative is 0, as torch has it."""
    if ACTIVATION == "relu" or ACTIVATION == "relu2":
        value = tl.where(g <= 0.0, 0.0, g)
        derivative = tl.where(g <= 0.0, 0.0, 1.0)
        if ACTIVATION == "relu2":
            derivative = 2.0 * value
            value = value * value
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(g * _SQRT_HALF))
        value = g * below
        derivative = below + g * tl.exp(-0.5 * g * g) * _INVERSE_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        s = tl.sigmoid((g + g * g * g * _CUBIC) * _TWO_SQRT_2_OVER_PI)
        value = g * s
        derivative = s + value * (1.0 - s) * (1.0 + g * g * _CUBIC * 3.0) * _TWO_SQRT_2_OVER_PI
    elif ACTIVATION == "silu":
        s = tl.sigmoid(g)
        value = g * s
        derivative = s + value * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == CLAMPED, "unknown activation")
        s = tl.sigmoid(g * _ALPHA)
        value = g * s
        derivative = s + value * (1.0 - s) * _ALPHA
    return value, derivative


@triton.jit
def _tile_of(program, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the first column of a program's tile."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    group = program // (GROUP * column_tiles)
    within = program % (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    return (group * GROUP + within % size) * ROWS, within // size * COLUMNS


@triton.jit
def _project(
    x_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    row,
    column,
    num_rows,
    num_columns,
    width,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """gate and up of a tile in fp32; gate is zero where there is none.

    A tile that hangs over an edge repeats the last line inside, so that only the end of C needs a mask. Large offsets
    are scalars; within a tile 32 bits are enough, which saves registers.
    """
    inner = tl.arange(0, BLOCK_C)
    rows = tl.minimum(tl.arange(0, ROWS), num_rows - 1 - row)
    columns = tl.minimum(tl.arange(0, COLUMNS), num_columns - 1 - column)
    x_places = rows[:, None] * width + inner[None, :]
    weight_places = columns[None, :] * width + inner[:, None]
    x_ptr += row.to(tl.int64) * width
    up_weight_ptr += column.to(tl.int64) * width
    if gate_weight_ptr is not None:
        gate_weight_ptr += column.to(tl.int64) * width
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        if EVEN:
            x = tl.load(x_ptr + start + x_places)
            up = dot(x, tl.load(up_weight_ptr + start + weight_places), up)
            if gate_weight_ptr is not None:
                gate = dot(x, tl.load(gate_weight_ptr + start + weight_places), gate)
        else:
            left = width - start
            x = tl.load(x_ptr + start + x_places, mask=inner[None, :] < left, other=0.0)
            inside = inner[:, None] < left
            up = dot(x, tl.load(up_weight_ptr + start + weight_places, mask=inside, other=0.0), up)
            if gate_weight_ptr is not None:
                gate = dot(x, tl.load(gate_weight_ptr + start + weight_places, mask=inside, other=0.0), gate)
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + column + columns).to(tl.float32)[None, :]
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + column + columns).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def mlp_forward_kernel(
    x_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    h_ptr,
    num_rows,
    num_columns,
    width,
    limit,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of h."""
    row, column = _tile_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP)
    gate, up = _project(
        x_ptr, gate_weight_ptr, up_weight_ptr, gate_bias_ptr, up_bias_ptr,
        row, column, num_rows, num_columns, width, EVEN, ROWS, COLUMNS, BLOCK_C,
    )  # fmt: skip
    if ACTIVATION == CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    if gate_weight_ptr is None:
        h, _ = activate_tile(up, ACTIVATION)
    else:
        h, _ = activate_tile(gate, ACTIVATION)
        h *= up
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows - row) & (columns < num_columns - column)
    first, places = row.to(tl.int64) * num_columns + column, rows * num_columns + columns
    tl.store(h_ptr + first + places, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mlp_backward_kernel(
    dh_ptr,
    x_ptr,
    gate_weight_ptr,
    up_weight_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    num_rows,
    num_columns,
    width,
    limit,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of dgate, dup and h from dh and the recomputed gate and up."""
    row, column = _tile_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP)
    gate, up = _project(
        x_ptr, gate_weight_ptr, up_weight_ptr, gate_bias_ptr, up_bias_ptr,
        row, column, num_rows, num_columns, width, EVEN, ROWS, COLUMNS, BLOCK_C,
    )  # fmt: skip
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows - row) & (columns < num_columns - column)
    first, places = row.to(tl.int64) * num_columns + column, rows * num_columns + columns
    dh = tl.load(dh_ptr + first + places, mask=inside, other=0.0).to(tl.float32)
    if gate_weight_ptr is None:
        h, slope = activate_tile(up, ACTIVATION)
        dup = dh * slope
    else:
        gate_kept = 1.0
        up_kept = 1.0
        if ACTIVATION == CLAMPED:
            gate_kept = tl.where(gate > limit, 0.0, 1.0)
            up_kept = tl.where((up > limit) | (up < -limit), 0.0, 1.0)
            gate = tl.where(gate > limit, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        activated, slope = activate_tile(gate, ACTIVATION)
        h = activated * up
        dup = dh * activated * up_kept
        dgate = dh * up * slope * gate_kept
        tl.store(dgate_ptr + first + places, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + first + places, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    tl.store(h_ptr + first + places, h.to(h_ptr.dtype.element_ty), mask=inside)


# --- configurations ---------------------------------------------------------------------------------------------------


def shared_estimate(config: Config, dtype: torch.dtype, accumulators: int) -> int:
    """Bytes of shared memory that the pipelined loop holds at most."""
    blocks = config.blocks
    return config.num_stages * (blocks["ROWS"] + accumulators * blocks["COLUMNS"]) * blocks["BLOCK_C"] * dtype.itemsize


def _config(target: Target, dtype: torch.dtype, accumulators: int, blocks: tuple[int, int, int], warps: int) -> Config:
    """With as many stages, up to four, as fit in shared memory beside 16 KiB for the epilogue."""
    rows, columns, inner = blocks
    config = Config({"ROWS": rows, "COLUMNS": columns, "BLOCK_C": inner, "GROUP": 8}, warps, 1)
    stages = (target.shared_bytes - 16 * 1024) // shared_estimate(config, dtype, accumulators)
    return Config(config.blocks, warps, max(1, min(2 if target.is_amd else 4, stages)))


def _rule(shape: Shape, dtype: torch.dtype, target: Target, *, accumulators: int, backward: bool) -> Config:
    if target.interpreted:
        return Config({"ROWS": 16, "COLUMNS": 16, "BLOCK_C": 16, "GROUP": 2})
    # wgmma and tcgen05 want 64 rows; fewer tokens are bound by reading the weights anyway.
    fewest = 64 if target.arch in ("sm_90", "sm_100") else 16
    rows = max(fewest, next_power_of_2(min(shape["N"], 128)))
    if dtype.itemsize == 4:
        return _config(target, dtype, accumulators, (min(rows, 64), 64, 32), 4 if accumulators == 1 else 8)
    if target.is_amd:
        return _config(target, dtype, accumulators, (rows, 64 if accumulators == 2 else 128, 32), 4 if rows < 64 else 8)
    if rows < 128:
        return _config(target, dtype, accumulators, (rows, 64, 64), 4)
    if accumulators == 2:
        # 128 x 128 leaves the epilogue too few registers on sm_80, and that of the backward everywhere.
        return _config(target, dtype, accumulators, (128, 64 if backward or target.arch == "sm_80" else 128, 64), 8)
    # The error function of gelu takes more registers than the other activations.
    tight = backward + shape["exact_erf"] + (target.arch == "sm_80")
    return _config(target, dtype, accumulators, (128, (256, 128, 128, 64)[tight], 64), 8)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target, *, accumulators: int) -> list[Config]:
    inner = 32 if dtype.itemsize == 4 or target.is_amd else 64
    return [
        _config(target, dtype, accumulators, (rows, columns, inner), warps)
        for rows in (16, 32, 64, 128, 256)
        for columns in (64, 128, 256)
        for warps in (4, 8)
        if rows <= 2 * max(16, shape["N"])
        # No more fp32 accumulators than half of the registers hold, no fewer than a tensor core wants.
        and 8 * 32 * warps <= rows * columns * accumulators <= 128 * 32 * warps
    ]


def _tunable(name: str, accumulators: int, backward: bool) -> Tunable:
    rule: Callable[[Shape, torch.dtype, Target], Config] = partial(_rule, accumulators=accumulators, backward=backward)
    return Tunable(name, rule, partial(_candidates, accumulators=accumulators))


# By (gated, backward).
TUNABLES = {
    (True, False): _tunable("gated_mlp_forward", 2, False),
    (True, True): _tunable("gated_mlp_backward", 2, True),
    (False, False): _tunable("mlp_forward", 1, False),
    (False, True): _tunable("mlp_backward", 1, True),
}


# --- launchers --------------------------------------------------------------------------------------------------------


def launch_forward(
    x_NC: Tensor,
    gate: tuple[Tensor, Tensor | None] | None,
    up: tuple[Tensor, Tensor | None],
    activation: str,
    limit: float | None,
) -> Tensor:
    """h_NF. `gate` and `up` are weight [F, C] and bias [F], contiguous and in the dtype of x."""
    h_NF = x_NC.new_empty(x_NC.shape[0], up[0].shape[0], dtype=result_dtype(x_NC.dtype))
    _launch(mlp_forward_kernel, False, {"h_ptr": h_NF}, x_NC, gate, up, activation, limit)
    return rounded(h_NF, x_NC.dtype)


def launch_backward(
    dh_NF: Tensor,
    x_NC: Tensor,
    gate: tuple[Tensor, Tensor | None] | None,
    up: tuple[Tensor, Tensor | None],
    activation: str,
    limit: float | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dgate_NF (None without a gate), dup_NF and h_NF."""
    h_NF = torch.empty_like(dh_NF, dtype=result_dtype(x_NC.dtype))
    dup_NF = torch.empty_like(h_NF)
    dgate_NF = None if gate is None else torch.empty_like(h_NF)
    outputs = {"dh_ptr": dh_NF, "dgate_ptr": dgate_NF, "dup_ptr": dup_NF, "h_ptr": h_NF}
    _launch(mlp_backward_kernel, True, outputs, x_NC, gate, up, activation, limit)
    dgate_NF = None if dgate_NF is None else rounded(dgate_NF, x_NC.dtype)
    return dgate_NF, rounded(dup_NF, x_NC.dtype), rounded(h_NF, x_NC.dtype)


def _launch(
    kernel: object,
    backward: bool,
    tensors: dict[str, Tensor | None],
    x_NC: Tensor,
    gate: tuple[Tensor, Tensor | None] | None,
    up: tuple[Tensor, Tensor | None],
    activation: str,
    limit: float | None,
) -> None:
    num_rows, width = x_NC.shape
    num_columns = up[0].shape[0]
    tunable = TUNABLES[(gate is not None, backward)]
    sizes = {"N": num_rows, "C": width, "F": num_columns, "exact_erf": int(activation == "gelu")}
    config = tunable.pick(x_NC.dtype, target_of(x_NC), **sizes)
    arguments = {
        **tensors,
        "x_ptr": x_NC,
        "gate_weight_ptr": None if gate is None else gate[0],
        "up_weight_ptr": up[0],
        "gate_bias_ptr": None if gate is None else gate[1],
        "up_bias_ptr": up[1],
        "num_rows": num_rows,
        "num_columns": num_columns,
        "width": width,
        "limit": limit,
        "ACTIVATION": activation,
        "EVEN": width % config.blocks["BLOCK_C"] == 0,
    }
    tiles = ceil_div(num_rows, config.blocks["ROWS"]) * ceil_div(num_columns, config.blocks["COLUMNS"])
    launch(kernel, (tiles,), config, arguments)
