"""The backward kernels of RMSNorm and LayerNorm.

    n = (x - mean) * rstd      g = dy * weight      a = mean of g * n over the row      c = mean of g (0 for RMSNorm)
    dx = rstd * (g - n * a - c) (+ the gradient of the sum)      dweight = sum of dy * n      dbias = sum of dy

n is computed again from x and the saved statistics. A few programs per multiprocessor stride over the rows and keep
their own sums for weight and bias, which torch adds up: no atomics, so the bits repeat. The loads of the next rows are
under way while these are worked on. Rows of more than `MAX_BLOCK` numbers would not fit into registers: there one
kernel computes a and c of every row first, and the programs take blocks of columns.

Bytes per row of C numbers of b bytes: 3 C b, with the gradient of a sum 4 C b, wider than `MAX_BLOCK` 2 C b more. The
sums are written and read once, 8 C bytes per program and result: with the 264 programs of an H200 (C = 4096) as much as
352 rows of bf16, 4 % of 8192 rows, and they stay in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.norm.forward import load_scale
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

# The widest row that is taken whole: 16 numbers of each tensor for each of 512 threads.
MAX_BLOCK = 8192


@triton.jit
def _load_of_rows(ptr, rows, num_rows):
    """One number of each row: [ROWS, 1]."""
    return tl.load(ptr + rows, mask=rows < num_rows, other=0.0)[:, None]


@triton.jit
def _add_pairs(first, second, more_first, more_second):
    return first + more_first, second + more_second


@triton.jit
def _means_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, product_mean_ptr, gradient_mean_ptr, width,
    UNIT_OFFSET: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the means of g * n, and of g, over a row."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * width
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros([BLOCK_C], dtype=tl.float32)
    gradients = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        dy = tl.load(dy_ptr + begin + columns, mask=columns < width, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + begin + columns, mask=columns < width, other=0.0).to(tl.float32)
        dy *= load_scale(weight_ptr, columns, width, UNIT_OFFSET)
        products += dy * (x - mean) * rstd
        gradients += dy
    tl.store(product_mean_ptr + row, tl.sum(products, axis=0) / width)
    if mean_ptr is not None:
        tl.store(gradient_mean_ptr + row, tl.sum(gradients, axis=0) / width)


@triton.jit
def _backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, product_mean_ptr, gradient_mean_ptr, dx_ptr, dweight_ptr,
    dbias_ptr, num_rows, width,
    UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th block of ROWS rows, and the program's sums for weight and bias.

    A row is whole, or a block of columns of a row whose means are given.
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = load_scale(weight_ptr, columns, width, UNIT_OFFSET)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for start in tl.range(program * ROWS, num_rows, num_programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        rstd = _load_of_rows(rstd_ptr, rows, num_rows)
        if mean_ptr is not None:
            normed -= _load_of_rows(mean_ptr, rows, num_rows)
        normed *= rstd
        dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
        # Outside the row dy is zero, and so is every product with it.
        dy *= scale
        if product_mean_ptr is not None:
            product_mean = _load_of_rows(product_mean_ptr, rows, num_rows)
            if mean_ptr is not None:
                gradient_mean = _load_of_rows(gradient_mean_ptr, rows, num_rows)
        elif mean_ptr is not None:
            # Both sums by one pass through shared memory: the wait for it is what a row costs beside its bytes.
            product_sum, gradient_sum = tl.reduce((dy * normed, dy), 1, _add_pairs)
            product_mean, gradient_mean = (product_sum / width)[:, None], (gradient_sum / width)[:, None]
        else:
            product_mean = (tl.sum(dy * normed, axis=1) / width)[:, None]
        dx = dy - normed * product_mean
        if mean_ptr is not None:
            dx -= gradient_mean
        dx *= rstd
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    sums = program.to(tl.int64) * width + columns
    tl.store(dweight_ptr + sums, tl.sum(dweight, axis=0), mask=columns < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + sums, tl.sum(dbias, axis=0), mask=columns < width)


# Numbers that a thread holds of each tensor, the threads at work on a multiprocessor, and the registers of each.
_THREAD_NUMBERS = 16
_RESIDENT_THREADS = 512
_REGISTERS = 128
_WIDE_BLOCK = 1024


def _block(width: int) -> int:
    return next_power_of_2(width) if width <= MAX_BLOCK else _WIDE_BLOCK


def _stages(num_sums: int, dtype: torch.dtype, target: Target) -> int:
    """One more than the tiles under way: one where a tile has many bytes or registers are scarce, otherwise two."""
    if target.is_amd:
        return 1  # they would wait in registers
    return 3 if dtype.itemsize == 2 and num_sums == 1 else 2


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    block = _block(shape["exact_C"])
    if target.interpreted:
        return Config({"ROWS": 2, "STAGES": 1, "BLOCK_C": block})
    rows = max(1, min(16, 2048 // block))
    warps = max(4, rows * block // (32 * _THREAD_NUMBERS)) // (2 if target.is_amd else 1)
    stages = _stages(shape["NUM_SUMS"], dtype, target)
    return Config({"ROWS": rows, "STAGES": stages, "BLOCK_C": block}, num_warps=warps, num_stages=stages)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    block = _block(shape["exact_C"])
    return [
        Config({"ROWS": rows, "STAGES": stages, "BLOCK_C": block}, warps, stages)
        for rows in (1, 2, 4, 8, 16)
        for warps in (2, 4, 8, 16, 32)
        for stages in (1, 2, 3)
        if 8 <= rows * block // (32 * warps) <= 32
        and (target.is_amd or 32 * warps * _REGISTERS <= 65536)
        and (stages - 1) * 3 * rows * block * dtype.itemsize <= target.shared_bytes
    ]


def _means_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return Config({"BLOCK_C": 16 if target.interpreted else 4096}, num_warps=4 if target.is_amd else 8, num_stages=1)


def _means_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [Config({"BLOCK_C": block}, warps, 1) for block in (2048, 4096, 8192) for warps in (4, 8, 16)]


BACKWARD = Tunable("norm_backward", _rule, _candidates)
MEANS = Tunable("norm_backward_means", _means_rule, _means_candidates)


def num_programs(num_rows: int, column_blocks: int, config: Config, target: Target) -> int:
    """Programs that stride over the rows: as many as are at work at a time, all columns counted."""
    threads = config.num_warps * (64 if target.is_amd else 32)
    at_work = target.num_sms * max(1, _RESIDENT_THREADS // threads)
    return min(ceil_div(num_rows, config.blocks["ROWS"]), max(1, at_work // column_blocks))


def launch_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight_C: Tensor,
    mean_N: Tensor | None,
    rstd_N: Tensor,
    *,
    has_bias: bool = False,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the shape and dtype of x (dsum added), dweight, and dbias (empty without a bias), both fp32.

    `mean_N` None: RMSNorm.
    """
    x, dy = x.contiguous(), dy.contiguous()
    width = x.shape[-1]
    num_rows = x.numel() // max(1, width)
    target = target_of(x)
    config = BACKWARD.pick(x.dtype, target, N=num_rows, exact_C=width, NUM_SUMS=1 + has_bias)
    column_blocks = max(1, ceil_div(width, config.blocks["BLOCK_C"]))
    programs = num_programs(num_rows, column_blocks, config, target)
    dx = x.new_empty(x.shape, dtype=result_dtype(x.dtype))
    sums = x.new_empty(1 + has_bias, programs, width, dtype=torch.float32)
    arguments: dict[str, Any] = {
        "dy_ptr": dy,
        "x_ptr": x,
        "weight_ptr": weight_C.contiguous(),
        "mean_ptr": mean_N,
        "rstd_ptr": rstd_N,
        "product_mean_ptr": None,
        "gradient_mean_ptr": None,
        "width": width,
        "UNIT_OFFSET": unit_offset,
    }
    if column_blocks > 1:
        arguments["product_mean_ptr"] = torch.empty_like(rstd_N)
        arguments["gradient_mean_ptr"] = None if mean_N is None else torch.empty_like(rstd_N)
        launch(_means_kernel, (num_rows,), MEANS.pick(x.dtype, target, N=num_rows, C=width), arguments)
    arguments |= {
        "dsum_ptr": None if dsum is None else dsum.contiguous(),
        "dx_ptr": dx,
        "dweight_ptr": sums[0],
        "dbias_ptr": sums[1] if has_bias else None,
        "num_rows": num_rows,
    }
    options = None if target.is_amd else {"maxnreg": _REGISTERS}
    launch(_backward_kernel, (programs, column_blocks), config, arguments, options=options)
    # Two sums, for results of an operation may not share memory.
    dbias_C = sums[1].sum(dim=0) if has_bias else sums.new_empty(0)
    return rounded(dx, x.dtype), sums[0].sum(dim=0), dbias_C
