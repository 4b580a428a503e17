"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; optionally of x + residual.

Computed in fp32 whatever the dtype of x; the result has the dtype of x. `unit_offset` multiplies by (1 + weight), as
Gemma stores it. The backward recomputes the normalised input from x and one saved number per row, so that no fp32 copy
of the activation is kept.

    r = 1 / sqrt(mean(x^2) + eps)      g = dy * weight
    n = x * r      dx = r * (g - n * mean(g * n))      dweight = sum over rows of dy * n

`add_rms_norm` first forms s = x + residual (rounded to the dtype of x), normalises s and returns both: one pass instead
of two. Its backward adds the gradient of s to dx in the same pass.

Shapes: N rows (any leading dimensions), C width. Bytes per row of C numbers of b bytes: forward 2 C b (with residual
4 C b), backward 3 C b (with residual 4 C b); the sums of dweight are one row per program.
Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import Target, target_of, uses_triton
from trine.kernels.tuning import Config, Shape, Tunable

# A row is held in registers: 64 Ki numbers are 64 for each of 1024 threads.
MAX_WIDTH = 65536


def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.to(work)
    scale = weight_C.to(work) + unit_offset
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * scale).to(x_NC.dtype)


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """RMSNorm over the last dimension; x of any float dtype, weight of any float dtype; returns the dtype of x.

    Raises ValueError where the weight does not fit, or on a GPU for more than `MAX_WIDTH` numbers a row.
    """
    _check(x_NC, weight_C)
    if uses_triton(x_NC):
        _check_gpu(x_NC)
        return rms_norm_forward(x_NC, None, weight_C, eps, unit_offset)[0]
    if torch.is_grad_enabled() and (x_NC.requires_grad or weight_C.requires_grad):
        result: Tensor = _RMSNorm.apply(x_NC, _scale(weight_C, unit_offset), eps)
        return result
    return _normalise(x_NC.reshape(-1, x_NC.shape[-1]), _scale(weight_C, unit_offset), eps)[0].view(x_NC.shape)


def add_rms_norm(
    x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual; both inputs of one dtype and shape. Raises ValueError otherwise."""
    _check(x_NC, weight_C)
    if x_NC.dtype != residual_NC.dtype or x_NC.shape != residual_NC.shape:
        raise ValueError(
            f"x is {x_NC.dtype} {tuple(x_NC.shape)} but residual is {residual_NC.dtype} {tuple(residual_NC.shape)}; "
            "they must agree"
        )
    if uses_triton(x_NC):
        _check_gpu(x_NC)
        y_NC, sum_NC, _ = rms_norm_forward(x_NC, residual_NC, weight_C, eps, unit_offset)
        return y_NC, sum_NC
    sum_NC = x_NC + residual_NC
    return rms_norm(sum_NC, weight_C, eps, unit_offset=unit_offset), sum_NC


def _check(x_NC: Tensor, weight_C: Tensor) -> None:
    if x_NC.dim() == 0 or weight_C.shape != x_NC.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight_C.shape)} but x has {tuple(x_NC.shape)}; expected [C] for [..., C]"
        )
    if not (x_NC.is_floating_point() and weight_C.is_floating_point()):
        raise ValueError(f"x is {x_NC.dtype} and weight {weight_C.dtype}; both must be floating point")


def _check_gpu(x_NC: Tensor) -> None:
    if x_NC.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rows of {x_NC.shape[-1]} numbers are too wide for the kernel; at most {MAX_WIDTH}")
    if x_NC.dtype == torch.float64:
        raise ValueError("float64 is not supported by the kernel; use float32, bfloat16 or float16")


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rstd_ptr,
    num_rows,
    width,
    eps,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises ROWS whole rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + places, x.to(sum_ptr.dtype.element_ty), mask=inside)
        # What is normalised is the sum as it is stored, so that the backward can start from it.
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    num_rows,
    width,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program strides over the rows and keeps its own sum for dweight: no atomics, so the bits repeat."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    dweight = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(program * ROWS, num_rows, num_programs * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normed = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
        dweight += dy * normed
        dy *= weight[None, :]
        mean = tl.sum(dy * normed, axis=1) / width
        dx = (dy - normed * mean[:, None]) * rstd[:, None]
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    sums = tl.sum(dweight, axis=0)
    tl.store(dweight_ptr + program.to(tl.int64) * width + columns, sums, mask=columns < width)


# Numbers that a program holds at a time: enough loads in flight to saturate memory, few enough for registers.
_PROGRAM_NUMBERS = 4096


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    block = next_power_of_2(shape["C"])
    if target.interpreted:
        return Config({"ROWS": 2, "BLOCK_C": block})
    rows = max(1, min(32, _PROGRAM_NUMBERS // block))
    return Config({"ROWS": rows, "BLOCK_C": block}, num_warps=min(16, max(4, rows * block // 1024)), num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    block = next_power_of_2(shape["C"])
    return [
        Config({"ROWS": rows, "BLOCK_C": block}, warps, 1)
        for rows in (1, 2, 4, 8, 16)
        for warps in (2, 4, 8, 16, 32)
        if 1024 <= rows * block <= 64 * 32 * warps
    ]


FORWARD = Tunable("rms_norm_forward", _rule, _candidates)
BACKWARD = Tunable("rms_norm_backward", _rule, _candidates)


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight_C: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y and s in the shape of x (s empty without residual), and 1 / sqrt(mean + eps): fp32 [N]."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    num_rows = x.numel() // max(1, width)
    y = torch.empty_like(x, dtype=result_dtype(x.dtype))
    total = torch.empty_like(x if residual is not None else x.new_empty(0), dtype=result_dtype(x.dtype))
    rstd_N = x.new_empty(num_rows, dtype=torch.float32)
    config = FORWARD.pick(x.dtype, target_of(x), N=num_rows, C=width)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight_C.contiguous(),
        "y_ptr": y,
        "sum_ptr": None if residual is None else total,
        "rstd_ptr": rstd_N,
        "num_rows": num_rows,
        "width": width,
        "eps": eps,
        "UNIT_OFFSET": unit_offset,
    }
    launch(_forward_kernel, (ceil_div(num_rows, config.blocks["ROWS"]),), config, arguments)
    return rounded(y, x.dtype), rounded(total, x.dtype), rstd_N


def _launch_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight_C: Tensor, rstd_N: Tensor, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """dx in the shape and dtype of x (dsum added), and dweight."""
    x, dy = x.contiguous(), dy.contiguous()
    width = x.shape[-1]
    num_rows = x.numel() // max(1, width)
    target = target_of(x)
    config = BACKWARD.pick(x.dtype, target, N=num_rows, C=width)
    num_programs = min(ceil_div(num_rows, config.blocks["ROWS"]), 2 * target.num_sms)
    dx = torch.empty_like(x, dtype=result_dtype(x.dtype))
    dweight_PC = x.new_empty(num_programs, width, dtype=torch.float32)
    arguments = {
        "dy_ptr": dy,
        "dsum_ptr": None if dsum is None else dsum.contiguous(),
        "x_ptr": x,
        "weight_ptr": weight_C.contiguous(),
        "rstd_ptr": rstd_N,
        "dx_ptr": dx,
        "dweight_ptr": dweight_PC,
        "num_rows": num_rows,
        "width": width,
        "UNIT_OFFSET": unit_offset,
    }
    launch(_backward_kernel, (num_programs,), config, arguments)
    return rounded(dx, x.dtype), dweight_PC.sum(dim=0).to(weight_C.dtype)


@torch.library.custom_op("trine::rms_norm_forward", mutates_args=())
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight_C: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: y, s (empty without residual), rstd_N."""
    return _launch_forward(x, residual, weight_C, eps, unit_offset)


@rms_norm_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight_C: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    return y, total, x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("trine::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight_C: Tensor, rstd_N: Tensor, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """The registered operation: dx, dweight."""
    return _launch_backward(dy, dsum, x, weight_C, rstd_N, unit_offset)


@rms_norm_backward.register_fake
def _(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight_C: Tensor, rstd_N: Tensor, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight_C)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight_C, _, ctx.unit_offset = inputs
    _, total, rstd_N = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight_C, rstd_N)
    ctx.mark_non_differentiable(rstd_N)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight_C, rstd_N = ctx.saved_tensors
    dsum = dsum if ctx.has_residual else None
    if dy is None:
        return dsum, dsum, None, None, None
    dx, dweight_C = rms_norm_backward(dy, dsum, x, weight_C, rstd_N, ctx.unit_offset)
    return dx, (dx if ctx.has_residual else None), dweight_C, None, None


rms_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype in HALF_AND_SINGLE:
        for rows, width in ((8192, 4096), (8192 * 32, 128)):
            x, weight, rstd = meta(rows, width, dtype=dtype), meta(width, dtype=dtype), meta(rows)
            shape = f"{rows}x{width}"
            yield Sample(f"rms_norm {shape}", dtype, partial(_launch_forward, x, None, weight, 1e-6, False))
            backward = partial(_launch_backward, x, None, x, weight, rstd, False)
            yield Sample(f"rms_norm backward {shape}", dtype, backward)
    dtype = torch.bfloat16
    x, weight, rstd = meta(8192, 4096, dtype=dtype), meta(4096, dtype=dtype), meta(8192)
    yield Sample("add_rms_norm 8192x4096", dtype, partial(_launch_forward, x, x, weight, 1e-6, True))
    yield Sample("add_rms_norm backward 8192x4096", dtype, partial(_launch_backward, x, x, x, weight, rstd, True))


# --- CPU --------------------------------------------------------------------------------------------------------------

# Numbers worked on at a time on a CPU, which bounds each fp32 intermediate result to 4 MiB. Pieces that fit a smaller
# cache were measured no faster, and make threads wait for each other more often.
_CHUNK_NUMBERS = 2**20


def _scale(weight_C: Tensor, unit_offset: bool) -> Tensor:
    return weight_C.float() + 1 if unit_offset else weight_C


def _chunk_rows(x_NC: Tensor) -> int:
    return max(1, _CHUNK_NUMBERS // x_NC.shape[-1])


def _normalise(x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, contiguous, and 1 / sqrt(mean(x^2) + eps) of each row."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    y_NC = torch.empty(x_NC.shape, dtype=x_NC.dtype, device=x_NC.device)
    rstd_N1 = torch.empty(len(x_NC), 1, dtype=work, device=x_NC.device)
    weight = weight_C.to(work)
    rows = _chunk_rows(x_NC)
    for x_nC, y_nC, rstd_n1 in zip(*(torch.split(t, rows) for t in (x_NC, y_NC, rstd_N1)), strict=True):
        normed_nC = x_nC.to(work, copy=True)
        mean_n1 = torch.linalg.vector_norm(normed_nC, dim=-1, keepdim=True).square_().div_(x_NC.shape[-1])
        torch.rsqrt(mean_n1.add_(eps), out=rstd_n1)
        y_nC.copy_(normed_nC.mul_(rstd_n1).mul_(weight))
    return y_NC, rstd_N1


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        x_NC = x.reshape(-1, x.shape[-1])
        y_NC, rstd_N1 = _normalise(x_NC, weight_C, eps)
        ctx.save_for_backward(x_NC, weight_C, rstd_N1)
        return y_NC.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NC, weight_C, rstd_N1 = ctx.saved_tensors
        work = rstd_N1.dtype
        dy_NC = grads[0].reshape(x_NC.shape)
        dx_NC = torch.empty(x_NC.shape, dtype=x_NC.dtype, device=x_NC.device)
        dweight_C = torch.zeros_like(weight_C, dtype=work)
        weight = weight_C.to(work)
        rows = _chunk_rows(x_NC)
        parts = (torch.split(tensor, rows) for tensor in (x_NC, dy_NC, dx_NC, rstd_N1))
        for x_nC, dy_nC, dx_nC, rstd_n1 in zip(*parts, strict=True):
            normed_nC = x_nC.to(work, copy=True).mul_(rstd_n1)
            g_nC = dy_nC.to(work, copy=True)
            products_nC = normed_nC * g_nC
            dweight_C += products_nC.sum(dim=0)
            mean_n1 = torch.mv(products_nC, weight).div_(x_NC.shape[-1])[:, None]
            dx_nC.copy_(g_nC.mul_(weight).addcmul_(normed_nC, mean_n1, value=-1).mul_(rstd_n1))
        return dx_NC.view(grads[0].shape), dweight_C.to(weight_C.dtype), None
