"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; optionally of x + residual.

Computed in fp32 whatever the dtype of x; the result has the dtype of x. `unit_offset` multiplies by (1 + weight), as
Gemma stores it. The backward recomputes the normalised input from x and one saved number per row, so that no fp32 copy
of the activation is kept.

    r = 1 / sqrt(mean(x^2) + eps)      g = dy * weight
    n = x * r      dx = r * (g - n * mean(g * n))      dweight = sum over rows of dy * n

`add_rms_norm` first forms s = x + residual (rounded to the dtype of x), normalises s and returns both: one pass instead
of two. Its backward adds the gradient of s to dx in the same pass. The kernels are those of LayerNorm, in `norm/`.

Shapes: N rows (any leading dimensions), C width. Bytes per row of C numbers of b bytes: forward 2 C b (with residual
4 C b), backward 3 C b (with residual 4 C b), in rows of more than 8192 numbers 2 C b more. Each program's sum for
dweight, 8 C bytes, counts little beside its rows (`norm/backward.py`). 4 C operations forward, 9 C backward.
Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.norm.backward import launch_backward
from trine.kernels.norm.checks import check_norm
from trine.kernels.norm.forward import launch_forward
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import uses_triton


def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.to(work)
    scale = weight_C.to(work) + unit_offset
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * scale).to(x_NC.dtype)


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """RMSNorm over the last dimension; x of any float dtype, weight of any float dtype; returns the dtype of x.

    Rows may be of any width. Raises ValueError where the weight does not fit x, and on a GPU for float64.
    """
    check_norm(x_NC, weight_C)
    if uses_triton(x_NC):
        normed: Tensor = run(rms_norm_forward, x_NC, None, weight_C, eps, unit_offset)[0]
        return normed
    if torch.is_grad_enabled() and (x_NC.requires_grad or weight_C.requires_grad):
        result: Tensor = _RMSNorm.apply(x_NC, _scale(weight_C, unit_offset), eps)
        return result
    return _normalise(x_NC.reshape(-1, x_NC.shape[-1]), _scale(weight_C, unit_offset), eps)[0].view(x_NC.shape)


def add_rms_norm(
    x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual; both inputs of one dtype and shape. Raises ValueError otherwise."""
    check_norm(x_NC, weight_C, residual_NC=residual_NC)
    if uses_triton(x_NC):
        y_NC, sum_NC, _ = run(rms_norm_forward, x_NC, residual_NC, weight_C, eps, unit_offset)
        return y_NC, sum_NC
    sum_NC = x_NC + residual_NC
    return rms_norm(sum_NC, weight_C, eps, unit_offset=unit_offset), sum_NC


# --- Triton -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("trine::rms_norm_forward", mutates_args=())
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight_C: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: y, s (empty without residual), rstd_N."""
    y, total, _, rstd_N = launch_forward(x, residual, weight_C, None, eps, centred=False, unit_offset=unit_offset)
    return y, total, rstd_N


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
    """The registered operation: dx (dsum added), dweight."""
    dx, dweight_C, _ = launch_backward(dy, dsum, x, weight_C, None, rstd_N, unit_offset=unit_offset)
    return dx, dweight_C.to(weight_C.dtype)


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
    dx, dweight_C = run(rms_norm_backward, dy, dsum, x, weight_C, rstd_N, ctx.unit_offset)
    return dx, (dx if ctx.has_residual else None), dweight_C, None, None


rms_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype in HALF_AND_SINGLE:
        yield from _sample_pair("rms_norm", dtype, 8192, 4096)
        yield from _sample_pair("rms_norm", dtype, 8192 * 32, 128)
    for num_rows, width in ((65536, 1024), (8192, 5120), (8192, 8192), (4096, 16384), (1024, 65536)):
        yield from _sample_pair("rms_norm", torch.bfloat16, num_rows, width)
    yield from _sample_pair("add_rms_norm", torch.bfloat16, 8192, 4096)
    yield from _sample_pair("add_rms_norm", torch.float32, 4096, 16384)


def _sample_pair(name: str, dtype: torch.dtype, num_rows: int, width: int) -> Iterator[Sample]:
    x, weight, rstd = meta(num_rows, width, dtype=dtype), meta(width, dtype=dtype), meta(num_rows)
    residual = x if name.startswith("add") else None
    forward = partial(launch_forward, x, residual, weight, None, 1e-6, centred=False)
    yield Sample(f"{name} {num_rows}x{width}", dtype, forward)
    backward = partial(launch_backward, x, residual, x, weight, None, rstd)
    yield Sample(f"{name} backward {num_rows}x{width}", dtype, backward)


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
