"""The weighted sum of a token's experts: y[n] = sum over slots k of weight[n, k] * rows[row of (n, k)].

A gather: each program reads the rows of its tokens in the order of the slots and adds them in fp32, so nothing is added
atomically and the bits repeat. Slots of no expert add nothing. Without weights it is the plain sum, the backward of
fetching a token once for each of its slots.

    drows[row of (n, k)] = weight[n, k] dy[n]        dweight[n, k] = dy[n] . rows[row of (n, k)]

Shapes: N tokens, K slots, P = N K rows in grouped order, C width. Bytes of b-byte numbers: forward b C (P + N);
backward b C (2 P + N) and more where the tokens of an expert are far apart.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.moe.groups import Groups
from trine.kernels.operation import run
from trine.kernels.target import target_of, uses_triton
from trine.kernels.tuning import Config


def combine(rows_PC: Tensor, weights_NK: Tensor, groups: Groups) -> Tensor:
    """y_NC in the dtype of `rows`, summed in fp32; weights of any float dtype.

    Raises ValueError for shapes that do not fit the groups, numbers that are not floating point, and on a GPU float64.
    """
    num_pairs = len(groups.pair_P)
    if rows_PC.dim() != 2 or len(rows_PC) != num_pairs:
        raise ValueError(f"rows have shape {tuple(rows_PC.shape)}; expected [{num_pairs}, C] for these groups")
    shape = (num_pairs // groups.num_slots, groups.num_slots)
    if tuple(weights_NK.shape) != shape:
        raise ValueError(f"weights have shape {tuple(weights_NK.shape)}; expected {shape} for these groups")
    for name, tensor in (("rows", rows_PC), ("weights", weights_NK)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} are {tensor.dtype}; they must be floating point")
    if uses_triton(rows_PC):
        if torch.float64 in (rows_PC.dtype, weights_NK.dtype):
            raise ValueError("float64 is not supported by the kernel; use float32, bfloat16 or float16")
        y_NC: Tensor = run(moe_combine, rows_PC, weights_NK, *groups)
        return y_NC
    return combine_in_slot_order(rows_PC, weights_NK, groups)


def combine_in_slot_order(rows_PC: Tensor, weights_NK: Tensor, groups: Groups) -> Tensor:
    """The same in torch: summed in fp32 (fp64 for fp64 rows) in the order of the kernel."""
    work = torch.promote_types(rows_PC.dtype, torch.float32)
    row_NK = groups.row_P.view(-1, groups.num_slots)
    weights_NK = torch.where(row_NK < groups.offset[-1], weights_NK, 0.0)  # nothing of no expert
    y_NC = torch.zeros(len(row_NK), rows_PC.shape[1], dtype=work, device=rows_PC.device)
    for row_N, weight_N in zip(row_NK.unbind(1), weights_NK.to(work).unbind(1), strict=True):
        y_NC = torch.addcmul(y_NC, rows_PC.index_select(0, row_N).to(work), weight_N[:, None])
    return y_NC.to(rows_PC.dtype)


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def _combine_kernel(
    rows_ptr,
    weight_ptr,
    y_ptr,
    row_ptr,
    offset_ptr,
    num_tokens,
    width,
    num_experts,
    NUM_SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known, wanted = tokens < num_tokens, columns < width
    num_rows = tl.load(offset_ptr + num_experts)
    total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for slot in range(NUM_SLOTS):
        pairs = tokens * NUM_SLOTS + slot
        rows = tl.load(row_ptr + pairs, mask=known, other=0)
        inside = (known & (rows < num_rows))[:, None] & wanted[None, :]
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        values = tl.load(rows_ptr + places, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + pairs, mask=known, other=0.0).to(tl.float32)
            values *= weight[:, None]
        # A weight may be NaN or infinite where there is no expert.
        total += tl.where(inside, values, 0.0)
    places = tokens[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=known[:, None] & wanted[None, :])


@triton.jit
def _combine_backward_kernel(
    dy_ptr,
    rows_ptr,
    weight_ptr,
    drows_ptr,
    dweight_ptr,
    pair_ptr,
    offset_ptr,
    num_pairs,
    width,
    num_experts,
    NUM_SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows, all of their columns; zeros in rows of no expert."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    known = rows < num_pairs
    owned = rows < tl.load(offset_ptr + num_experts)
    pairs = tl.load(pair_ptr + rows, mask=known, other=0)
    weight = tl.load(weight_ptr + pairs, mask=owned, other=0.0).to(tl.float32)
    row_places = rows[:, None].to(tl.int64) * width + columns[None, :]
    token_places = (pairs // NUM_SLOTS)[:, None].to(tl.int64) * width + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        wanted = columns[None, :] < width - start
        inside = owned[:, None] & wanted
        dy = tl.load(dy_ptr + start + token_places, mask=inside, other=0.0).to(tl.float32)
        total += dy * tl.load(rows_ptr + start + row_places, mask=inside, other=0.0).to(tl.float32)
        drows = dy * weight[:, None]
        tl.store(drows_ptr + start + row_places, drows.to(drows_ptr.dtype.element_ty), mask=known[:, None] & wanted)
    tl.store(dweight_ptr + pairs, tl.sum(total, axis=1), mask=known)


def _combine_config(interpreted: bool) -> Config:
    if interpreted:
        return Config({"TOKENS": 8, "COLUMNS": 16})
    return Config({"TOKENS": 4, "COLUMNS": 512}, num_warps=4, num_stages=2)


def _backward_config(interpreted: bool) -> Config:
    if interpreted:
        return Config({"ROWS": 8, "COLUMNS": 16})
    return Config({"ROWS": 4, "COLUMNS": 512}, num_warps=4, num_stages=2)


def launch_combine(rows_PC: Tensor, weights_NK: Tensor | None, groups: Groups) -> Tensor:
    """y_NC in the dtype of `rows`; the plain sum without weights."""
    rows_PC = rows_PC.contiguous()
    num_tokens, width = len(groups.pair_P) // groups.num_slots, rows_PC.shape[1]
    y_NC = rows_PC.new_empty(num_tokens, width, dtype=result_dtype(rows_PC.dtype))
    config = _combine_config(target_of(rows_PC).interpreted)
    arguments = {
        "rows_ptr": rows_PC,
        "weight_ptr": None if weights_NK is None else weights_NK.contiguous(),
        "y_ptr": y_NC,
        "row_ptr": groups.row_P,
        "offset_ptr": groups.offset,
        "num_tokens": num_tokens,
        "width": width,
        "num_experts": groups.num_experts,
        "NUM_SLOTS": groups.num_slots,
    }
    grid = (ceil_div(num_tokens, config.blocks["TOKENS"]), ceil_div(width, config.blocks["COLUMNS"]))
    launch(_combine_kernel, grid, config, arguments)
    return rounded(y_NC, rows_PC.dtype)


def _launch_backward(dy_NC: Tensor, rows_PC: Tensor, weights_NK: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """drows_PC and dweights_NK."""
    rows_PC = rows_PC.contiguous()
    num_pairs, width = rows_PC.shape
    drows_PC = torch.empty_like(rows_PC, dtype=result_dtype(rows_PC.dtype))
    dweights_NK = rows_PC.new_empty(weights_NK.shape, dtype=torch.float32)
    config = _backward_config(target_of(rows_PC).interpreted)
    arguments = {
        "dy_ptr": dy_NC.contiguous(),
        "rows_ptr": rows_PC,
        "weight_ptr": weights_NK.contiguous(),
        "drows_ptr": drows_PC,
        "dweight_ptr": dweights_NK,
        "pair_ptr": groups.pair_P,
        "offset_ptr": groups.offset,
        "num_pairs": num_pairs,
        "width": width,
        "num_experts": groups.num_experts,
        "NUM_SLOTS": groups.num_slots,
    }
    launch(_combine_backward_kernel, (ceil_div(num_pairs, config.blocks["ROWS"]),), config, arguments)
    return rounded(drows_PC, rows_PC.dtype), dweights_NK.to(weights_NK.dtype)


@torch.library.custom_op("trine::moe_combine", mutates_args=())
def moe_combine(
    rows_PC: Tensor, weights_NK: Tensor, pair_P: Tensor, row_P: Tensor, offset: Tensor, num_slots: int
) -> Tensor:
    """The registered operation: y_NC."""
    return launch_combine(rows_PC, weights_NK, Groups(pair_P, row_P, offset, num_slots))


@moe_combine.register_fake
def _(rows_PC: Tensor, weights_NK: Tensor, *_: Any) -> Tensor:
    return rows_PC.new_empty(weights_NK.shape[0], rows_PC.shape[1])


@torch.library.custom_op("trine::moe_combine_backward", mutates_args=())
def moe_combine_backward(
    dy_NC: Tensor,
    rows_PC: Tensor,
    weights_NK: Tensor,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
) -> tuple[Tensor, Tensor]:
    """The registered operation: drows_PC, dweights_NK."""
    return _launch_backward(dy_NC, rows_PC, weights_NK, Groups(pair_P, row_P, offset, num_slots))


@moe_combine_backward.register_fake
def _(dy_NC: Tensor, rows_PC: Tensor, weights_NK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    drows_PC = torch.empty_like(rows_PC, memory_format=torch.contiguous_format)
    return drows_PC, torch.empty_like(weights_NK, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_slots = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
    drows_PC, dweights_NK = run(moe_combine_backward, dy_NC, *ctx.saved_tensors, ctx.num_slots)
    return drows_PC, dweights_NK, None, None, None, None


moe_combine.register_autograd(_backward, setup_context=_setup_context)
