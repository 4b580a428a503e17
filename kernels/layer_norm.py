"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension; or of x + residual.

The variance is the biased one. Statistics in fp32: the mean first, then the variance of centred numbers. The result has
the dtype of x. The backward recomputes the normalised input from x and two saved numbers per row.

    r = 1 / sqrt(var(x) + eps)      n = (x - mean(x)) * r      g = dy * weight
    dx = r * (g - mean(g) - n * mean(g * n))      dweight = sum over rows of dy * n      dbias = sum over rows of dy

`add_layer_norm` first forms s = x + residual (rounded to the dtype of x), normalises s and returns both: one pass
instead of two. Its backward adds the gradient of s to dx in the same pass. The kernels, in `norm/`, are RMSNorm's too.
On a CPU value and input gradient come from torch's single-pass kernels, but the gradients of weight and bias are summed
here in fp32: torch sums them in bf16 for bf16 activations, which was measured 6 % off over 264 rows.

Shapes: N rows (any leading dimensions), C width. Bytes per row of C numbers of b bytes: forward 2 C b (with residual
4 C b), backward 3 C b (with residual 4 C b), in rows of more than 8192 numbers 2 C b more. Each program's sums for
dweight and dbias, 16 C bytes, count little beside its rows (`norm/backward.py`). 7 C operations forward, 12 C backward.
Source: Ba et al. 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.norm.backward import launch_backward
from trine.kernels.norm.checks import check_norm
from trine.kernels.norm.forward import launch_forward
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import uses_triton


def layer_norm_reference(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.to(work)
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight_C.to(work)
    return (y if bias_C is None else y + bias_C.to(work)).to(x_NC.dtype)


def layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension; weight and bias of any float dtype; returns the dtype of x.

    Rows may be of any width. Raises ValueError where weight or bias do not fit x, and on a GPU for float64.
    """
    check_norm(x_NC, weight_C, bias_C)
    if uses_triton(x_NC):
        normed: Tensor = run(layer_norm_forward, x_NC, None, weight_C, bias_C, eps)[0]
        return normed
    if torch.is_grad_enabled() and (x_NC.requires_grad or weight_C.requires_grad):
        result: Tensor = _LayerNorm.apply(x_NC, weight_C, bias_C, eps)  # type: ignore[no-untyped-call]
        return result
    bias = None if bias_C is None else bias_C.to(x_NC.dtype)
    return F.layer_norm(x_NC, (x_NC.shape[-1],), weight_C.to(x_NC.dtype), bias, eps)


def add_layer_norm(
    x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual; both inputs of one dtype and shape. Raises ValueError otherwise."""
    check_norm(x_NC, weight_C, bias_C, residual_NC)
    if uses_triton(x_NC):
        y_NC, sum_NC, _, _ = run(layer_norm_forward, x_NC, residual_NC, weight_C, bias_C, eps)
        return y_NC, sum_NC
    sum_NC = x_NC + residual_NC
    return layer_norm(sum_NC, weight_C, bias_C, eps), sum_NC


# --- Triton -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("trine::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight_C: Tensor, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered operation: y, s (empty without residual), mean_N, rstd_N."""
    return launch_forward(x, residual, weight_C, bias_C, eps, centred=True)


@layer_norm_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight_C: Tensor, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd_N = x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=torch.float32)
    return y, total, torch.empty_like(rstd_N), rstd_N


@torch.library.custom_op("trine::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight_C: Tensor,
    bias_C: Tensor | None,
    mean_N: Tensor,
    rstd_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: dx (dsum added), dweight, dbias (empty without bias)."""
    has_bias = bias_C is not None
    dx, dweight_C, dbias_C = launch_backward(dy, dsum, x, weight_C, mean_N, rstd_N, has_bias=has_bias)
    return dx, dweight_C.to(weight_C.dtype), dbias_C if bias_C is None else dbias_C.to(bias_C.dtype)


@layer_norm_backward.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight_C: Tensor,
    bias_C: Tensor | None,
    mean_N: Tensor,
    rstd_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias_C = rstd_N.new_empty(0) if bias_C is None else torch.empty_like(bias_C)
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight_C), dbias_C


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight_C, bias_C, _ = inputs
    _, total, mean_N, rstd_N = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight_C, bias_C, mean_N, rstd_N)
    ctx.mark_non_differentiable(mean_N, rstd_N)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dsum = dsum if ctx.has_residual else None
    if dy is None:
        return dsum, dsum, None, None, None
    dx, dweight_C, dbias_C = run(layer_norm_backward, dy, dsum, *tensors)
    has_bias = tensors[2] is not None
    return dx, (dx if ctx.has_residual else None), dweight_C, (dbias_C if has_bias else None), None


layer_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype in HALF_AND_SINGLE:
        yield from _sample_pair("layer_norm", dtype, 8192, 768)
    for num_rows, width in ((65536, 1024), (8192, 4096), (4096, 12288), (1024, 65536)):
        yield from _sample_pair("layer_norm", torch.bfloat16, num_rows, width)
    yield from _sample_pair("layer_norm without bias", torch.float32, 8192, 4096)
    yield from _sample_pair("add_layer_norm", torch.bfloat16, 8192, 1600)
    yield from _sample_pair("add_layer_norm", torch.float32, 4096, 16384)


def _sample_pair(name: str, dtype: torch.dtype, num_rows: int, width: int) -> Iterator[Sample]:
    x, weight, mean = meta(num_rows, width, dtype=dtype), meta(width, dtype=dtype), meta(num_rows)
    residual = x if name.startswith("add") else None
    bias = None if name.endswith("without bias") else weight
    forward = partial(launch_forward, x, residual, weight, bias, 1e-5, centred=True)
    yield Sample(f"{name} {num_rows}x{width}", dtype, forward)
    backward = partial(launch_backward, x, residual, x, weight, mean, mean, has_bias=bias is not None)
    yield Sample(f"{name} backward {num_rows}x{width}", dtype, backward)


# --- CPU --------------------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
        weight = weight_C.to(x_NC.dtype)
        bias = None if bias_C is None else bias_C.to(x_NC.dtype)
        y_NC, mean_N1, rstd_N1 = torch.native_layer_norm(x_NC, (x_NC.shape[-1],), weight, bias, eps)
        ctx.save_for_backward(x_NC, weight, mean_N1, rstd_N1)
        ctx.dtypes = (weight_C.dtype, None if bias_C is None else bias_C.dtype)
        return y_NC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x_NC, weight, mean_N1, rstd_N1 = ctx.saved_tensors
        (dy_NC,) = grads
        weight_dtype, bias_dtype = ctx.dtypes
        shape = (x_NC.shape[-1],)
        dx_NC = torch.ops.aten.native_layer_norm_backward(
            dy_NC, x_NC, shape, mean_N1, rstd_N1, weight, None, [True, False, False]
        )[0]
        work = torch.promote_types(x_NC.dtype, torch.float32)
        dy = dy_NC.to(work)
        normed = (x_NC.to(work) - mean_N1.to(work)).mul_(rstd_N1.to(work))
        dweight_C = normed.mul_(dy).flatten(0, -2).sum(dim=0).to(weight_dtype)
        dbias_C = None if bias_dtype is None else dy.flatten(0, -2).sum(dim=0).to(bias_dtype)
        return dx_NC, dweight_C, dbias_C, None
