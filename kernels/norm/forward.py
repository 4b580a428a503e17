"""The forward kernels of RMSNorm and LayerNorm, with the sum of a residual branch on the way.

A row is normalised in registers where it fits (`_rows_kernel`, up to `MAX_BLOCK` numbers): read once, written once.
The variance is that of centred numbers, computed after the mean, so that a large mean costs no digits. A wider row is
walked through in blocks, once for each statistic and once for the result. All but the first time it comes from the L2
cache while the rows at work fit there: at most four on a multiprocessor, on an H200 35 MB of 32 Ki bf16 numbers each,
of 64 Ki 69 MB, which is somewhat more than the cache.

The bits of a row do not depend on how many rows there are, nor on its place among them: the configuration follows from
the width alone, one compiled kernel serves every number of rows (`do_not_specialize`), and x begins at a multiple of 16
bytes always, for what a thread loads at a time, and so the order of a sum, follows from that.

Bytes per row of C numbers of b bytes: 2 C b, with a residual 4 C b; 4 or 8 more for the statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

# The widest row that is kept in registers: 32 numbers for each of 512 threads.
MAX_BLOCK = 16384


@triton.jit
def load_scale(weight_ptr, columns, width, UNIT_OFFSET: tl.constexpr):
    """The factors, weight or 1 + weight, in fp32."""
    scale = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return scale + 1.0 if UNIT_OFFSET else scale


@triton.jit
def _load_sum(x_ptr, residual_ptr, places, inside, LIKE: tl.constexpr):
    """x, or x + residual as it is stored: what is normalised then is what the backward starts from."""
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        x = x.to(LIKE).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, num_rows, width, eps,
    CENTRED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program normalises ROWS whole rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = _load_sum(x_ptr, residual_ptr, places, inside, y_ptr.dtype.element_ty)
    if residual_ptr is not None:
        tl.store(sum_ptr + places, x.to(sum_ptr.dtype.element_ty), mask=inside)
    if CENTRED:
        mean = tl.sum(x, axis=1) / width
        x = tl.where(inside, x - mean[:, None], 0.0)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    y = x * rstd[:, None] * load_scale(weight_ptr, columns, width, UNIT_OFFSET)[None, :]
    if bias_ptr is not None:
        y += load_scale(bias_ptr, columns, width, False)[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, width, eps,
    CENTRED: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program normalises one row, BLOCK_C numbers at a time."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * width
    mean = 0.0
    if CENTRED:
        sums = tl.zeros([BLOCK_C], dtype=tl.float32)
        for start in range(0, width, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            sums += _load_sum(x_ptr, residual_ptr, begin + columns, columns < width, y_ptr.dtype.element_ty)
        mean = tl.sum(sums, axis=0) / width
        tl.store(mean_ptr + row, mean)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        x = _load_sum(x_ptr, residual_ptr, begin + columns, columns < width, y_ptr.dtype.element_ty)
        x = tl.where(columns < width, x - mean, 0.0)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, width, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        x = _load_sum(x_ptr, residual_ptr, begin + columns, columns < width, y_ptr.dtype.element_ty)
        if residual_ptr is not None:
            tl.store(sum_ptr + begin + columns, x.to(sum_ptr.dtype.element_ty), mask=columns < width)
        y = (x - mean) * rstd * load_scale(weight_ptr, columns, width, UNIT_OFFSET)
        if bias_ptr is not None:
            y += load_scale(bias_ptr, columns, width, False)
        tl.store(y_ptr + begin + columns, y.to(y_ptr.dtype.element_ty), mask=columns < width)


# Numbers that a program holds at a time: enough loads in flight to saturate memory, few enough for registers.
_PROGRAM_NUMBERS = 4096


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    block = next_power_of_2(shape["exact_C"])
    if block > MAX_BLOCK:
        return Config({"BLOCK_C": 8192}, num_warps=8 if target.is_amd else 16, num_stages=1)
    if target.interpreted:
        return Config({"ROWS": 2, "BLOCK_C": block})
    rows = max(1, min(32, _PROGRAM_NUMBERS // block))
    return Config({"ROWS": rows, "BLOCK_C": block}, num_warps=min(16, max(4, rows * block // 1024)), num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    block = next_power_of_2(shape["exact_C"])
    if block > MAX_BLOCK:
        return [Config({"BLOCK_C": c}, warps, 1) for c in (4096, 8192) for warps in (8, 16) if c >= 256 * warps]
    return [
        Config({"ROWS": rows, "BLOCK_C": block}, warps, 1)
        for rows in (1, 2, 4, 8, 16, 32)
        for warps in (2, 4, 8, 16)
        if 8 <= rows * block // (32 * warps) <= 64
    ]


FORWARD = Tunable("norm_forward", _rule, _candidates)


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous, its first number at a multiple of 16 bytes; tensors without memory are taken to be so."""
    x = x.contiguous()
    return x if x.is_meta or x.data_ptr() % 16 == 0 else x.clone()


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor | None,
    eps: float,
    *,
    centred: bool,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and s in the shape of x (s empty without residual), mean and 1 / sqrt(variance + eps) of the rows: fp32 [N].

    Centred: LayerNorm; otherwise RMSNorm, whose mean counts as 0 and is returned empty.
    """
    x = _aligned(x)
    residual = None if residual is None else _aligned(residual)
    width = x.shape[-1]
    num_rows = x.numel() // max(1, width)
    y = x.new_empty(x.shape, dtype=result_dtype(x.dtype))
    total = torch.empty_like(y) if residual is not None else y.new_empty(0)
    mean_N, rstd_N = (x.new_empty(size, dtype=torch.float32) for size in (num_rows if centred else 0, num_rows))
    config = FORWARD.pick(x.dtype, target_of(x), exact_C=width)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight_C.contiguous(),
        "bias_ptr": None if bias_C is None else bias_C.contiguous(),
        "y_ptr": y,
        "sum_ptr": None if residual is None else total,
        "mean_ptr": mean_N if centred else None,
        "rstd_ptr": rstd_N,
        "width": width,
        "eps": eps,
        "CENTRED": centred,
        "UNIT_OFFSET": unit_offset,
    }
    if config.blocks["BLOCK_C"] < width:
        launch(_wide_kernel, (num_rows,), config, arguments)
    else:
        arguments["num_rows"] = num_rows
        launch(_rows_kernel, (ceil_div(num_rows, config.blocks["ROWS"]),), config, arguments)
    return rounded(y, x.dtype), rounded(total, x.dtype), mean_N, rstd_N
