"""A linear layer whose bits for a row depend on that row alone: not on how many rows there are, nor on its place.

    y = x W^T (+ bias)          dx = dy W          dW = dy^T x          dbias = sum over rows of dy

So a token decoded alone, in any batch, within a prompt or in a training step gets the same bits. cuBLAS and oneDNN
choose the order of a sum by shape. The three products are one kernel (`kernel.py`, with why the bits hold and the
costs; tiles in `configs.py`); the bits of dW repeat, and are those of its rows in their order.

On a CPU torch multiplies, always the same number of rows at a time, with zeros below the last: then every product of a
layer is the same call, and in one call all rows are treated alike. Other numbers take other paths with other sums, and
which ones differs between CPUs: on one, fewer than 4 rows in fp32 and the last few of each thread's share; on another
(AMX), fewer than 16 in fp32 and whole batches against parts in bf16. How many rows is a compromise of one token decoded
alone, which pays for all of them, and long batches (`_CPU_ROWS`). Whether a machine keeps to that, `keeps_row_bits`
finds out.

Source: He et al., "Defeating Nondeterminism in LLM Inference" (Thinking Machines, 2025) for what batch-invariance is
and why split K breaks it.

Shapes: N rows (any leading dimensions), C inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trine.kernels.invariant.configs import MATMUL, programs
from trine.kernels.invariant.kernel import invariant_kernel
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import Target, target_of, uses_triton

# Rows that are multiplied at a time on a CPU. Measured on one core with AMX and weights of 768 x 3072: 32 rows of fp32
# take 4.8 times as long as one and reach half the speed of long batches; 64 rows of bf16 1.5 times, and half.
_CPU_ROWS = {torch.float32: 32, torch.float64: 32, torch.bfloat16: 64, torch.float16: 64}


def invariant_matmul_reference(x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    y_NF = x_NC.to(work) @ weight_FC.to(work).T
    return (y_NF if bias_F is None else y_NF + bias_F.to(work)).to(x_NC.dtype)


def invariant_matmul(x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """y [..., F] in the dtype of x, with gradients; the bits of a row are those it has alone.

    x is [..., C], on a GPU fp32, bf16 or fp16; weight and bias may be of any float dtype and are cast to that of x
    (their gradients have their own). Raises ValueError, naming the argument, for shapes that do not fit, numbers that
    are not floating point, devices that differ, and on a GPU for float64. Where a machine does not keep the bits,
    `keeps_row_bits` says so; this function does not look.
    """
    _check(x_NC, weight_FC, bias_F)
    weight_FC = weight_FC.to(x_NC.dtype)
    bias_F = None if bias_F is None else bias_F.to(x_NC.dtype)
    if not uses_triton(x_NC):
        y_NF: Tensor = _InPieces.apply(_rows(x_NC), weight_FC, bias_F)  # type: ignore[no-untyped-call]
        return y_NF.view(*x_NC.shape[:-1], len(weight_FC))
    if x_NC.dtype not in HALF_AND_SINGLE:
        raise ValueError(f"x_NC is {x_NC.dtype}; the kernel supports float32, bfloat16 and float16")
    y_NF = run(invariant_product, _rows(x_NC), weight_FC, bias_F, False, False)
    return y_NF.view(*x_NC.shape[:-1], len(weight_FC))


def _rows(x_NC: Tensor) -> Tensor:
    return x_NC[None] if x_NC.dim() == 1 else x_NC.flatten(0, -2)


def _check(x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None) -> None:
    if x_NC.dim() == 0 or weight_FC.dim() != 2 or weight_FC.shape[1] != x_NC.shape[-1]:
        raise ValueError(
            f"weight_FC has shape {tuple(weight_FC.shape)} and x_NC {tuple(x_NC.shape)}; expected [F, C] and [..., C]"
        )
    if bias_F is not None and tuple(bias_F.shape) != (len(weight_FC),):
        raise ValueError(f"bias_F has shape {tuple(bias_F.shape)}; expected {(len(weight_FC),)}")
    for name, tensor in (("x_NC", x_NC), ("weight_FC", weight_FC), ("bias_F", bias_F)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be floating point")
        if tensor is not None and tensor.device != x_NC.device:
            raise ValueError(f"{name} is on {tensor.device} and x_NC on {x_NC.device}; expected one device")


# --- CPU --------------------------------------------------------------------------------------------------------------


def _in_pieces(x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None) -> Tensor:
    """The product, `_CPU_ROWS` rows at a time."""
    N, rows = len(x_NC), _CPU_ROWS.get(x_NC.dtype, 32)
    x_NC = x_NC.contiguous()
    if rows == N:
        return F.linear(x_NC, weight_FC, bias_F)
    y_NF = x_NC.new_empty(N, len(weight_FC))
    for first in range(0, N, rows):
        part_nC = x_NC[first : first + rows]
        count = len(part_nC)
        if count < rows:
            part_nC = F.pad(part_nC, (0, 0, 0, rows - count))
        y_NF[first : first + count] = F.linear(part_nC, weight_FC, bias_F)[:count]
    return y_NF


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NC, weight_FC)
        return _in_pieces(x_NC, weight_FC, bias_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_FC = ctx.saved_tensors
        (dy_NF,) = grads
        dx_NC = _in_pieces(dy_NF, weight_FC.T, None) if ctx.needs_input_grad[0] else None
        dweight_FC = dy_NF.T @ x_NC if ctx.needs_input_grad[1] else None
        work = torch.promote_types(dy_NF.dtype, torch.float32)
        dbias_F = dy_NF.sum(dim=0, dtype=work).to(dy_NF.dtype) if ctx.needs_input_grad[2] else None
        return dx_NC, dweight_FC, dbias_F


# --- whether it holds -------------------------------------------------------------------------------------------------

_PROBED_ROWS = (*range(1, 18), 31, 33, 63, 64, 65, 127, 128, 129, 300)


def keeps_row_bits(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether rows have the same bits alone and in batches of several sizes here, at several places of them.

    Compared with `torch.equal`, once for each dtype, device and number of threads: some milliseconds on a GPU, a second
    on a CPU. On a GPU the sizes take every tile that stands for another. Raises ValueError as `invariant_matmul` does.
    """
    return _probe(dtype, str(torch.device(device)), torch.get_num_threads())


@lru_cache(maxsize=32)
def _probe(dtype: torch.dtype, device: str, num_threads: int) -> bool:
    large = device.startswith("cuda")
    sizes = (2304, 1024, 16384) if large else (304, 512, 640)
    num_rows, width, wide = sizes
    generator = torch.Generator().manual_seed(0)
    x_NC, weight_FC = (torch.randn(n, width, generator=generator).to(device, dtype) for n in (num_rows, wide))
    with torch.no_grad():
        # The fewer columns there are, the smaller the tiles: their place must not count either.
        for columns in (wide, wide // 8):
            together = invariant_matmul(x_NC, weight_FC[:columns])
            if not torch.equal(together, invariant_matmul(x_NC, weight_FC)[:, :columns]):
                return False
            for count in _PROBED_ROWS:
                for first in (0, 1, num_rows - count):
                    part = invariant_matmul(x_NC[first : first + count], weight_FC[:columns])
                    if not torch.equal(part, together[first : first + count]):
                        return False
    return True


# --- Triton -----------------------------------------------------------------------------------------------------------


def launch_product(
    a: Tensor, b: Tensor, bias_N: Tensor | None, *, a_transposed: bool = False, b_transposed: bool = False
) -> Tensor:
    """c [M, N] in the dtype of a = a b^T + bias, for a [M, K] ([K, M] if transposed) and b [N, K] ([K, N])."""
    a, b = _lines_apart(a), _lines_apart(b)
    width, num_rows = a.shape if a_transposed else a.shape[::-1]
    num_columns = b.shape[1] if b_transposed else b.shape[0]
    target = target_of(a)
    config = MATMUL.pick(a.dtype, target, M=num_rows, N=num_columns, K=width)
    rows, columns, inner = (config.blocks[name] for name in ("ROWS", "COLUMNS", "BLOCK_K"))
    described = min(num_rows, num_columns, width) > 0 and all(_can_describe(t, target) for t in (a, b))
    c = a.new_empty(num_rows, num_columns, dtype=result_dtype(a.dtype))
    a_strides = a.stride()[::-1] if a_transposed else a.stride()
    b_strides = b.stride()[::-1] if b_transposed else b.stride()
    arguments = {
        "a_ptr": _described(a, [inner, rows] if a_transposed else [rows, inner]) if described else a,
        "b_ptr": _described(b, [inner, columns] if b_transposed else [columns, inner]) if described else b,
        "bias_ptr": None if bias_N is None else bias_N.contiguous(),
        "c_ptr": c,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "width": width,
        "a_row_stride": a_strides[0],
        "a_inner_stride": a_strides[1],
        "b_column_stride": b_strides[0],
        "b_inner_stride": b_strides[1],
        "A_TRANSPOSED": a_transposed,
        "B_TRANSPOSED": b_transposed,
        "DESCRIBED": described,
        "EVEN": width % inner == 0,
        "FAR": max(num_columns, *a.stride(), *b.stride()) * max(rows, columns, inner) >= 2**31,
        # AMD's compiler does not overlap loads with products in a flattened loop.
        "FLATTEN": not target.is_amd,
    }
    tiles = ceil_div(num_rows, rows) * ceil_div(num_columns, columns)
    launch(invariant_kernel, (programs(config, tiles, a.dtype, target),), config, arguments)
    return rounded(c, a.dtype)


def _lines_apart(x: Tensor) -> Tensor:
    """A matrix whose lines are contiguous each, however far apart."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _can_describe(x: Tensor, target: Target) -> bool:
    """Whether TMA can fetch pieces of x: from Hopper on, with everything a multiple of 16 bytes."""
    has_tma = target.arch.startswith(("sm_90", "sm_10")) and x.dtype != torch.float32
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and (has_tma or target.interpreted)


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


@torch.library.custom_op("trine::invariant_product", mutates_args=())
def invariant_product(a: Tensor, b: Tensor, bias_N: Tensor | None, a_transposed: bool, b_transposed: bool) -> Tensor:
    """The registered operation: see `launch_product`. It has gradients where neither is transposed."""
    return launch_product(a, b, bias_N, a_transposed=a_transposed, b_transposed=b_transposed)


@invariant_product.register_fake
def _(a: Tensor, b: Tensor, bias_N: Tensor | None, a_transposed: bool, b_transposed: bool) -> Tensor:
    return a.new_empty(a.shape[1 if a_transposed else 0], b.shape[1 if b_transposed else 0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_NC, weight_FC, bias_F, *transposed = inputs
    ctx.has_gradients = not any(transposed)
    ctx.bias_dtype = None if bias_F is None else bias_F.dtype
    ctx.save_for_backward(x_NC, weight_FC)


def _backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.has_gradients:
        raise RuntimeError("a transposed product has no gradient; call invariant_matmul")
    x_NC, weight_FC = ctx.saved_tensors
    dx_NC = run(invariant_product, dy_NF, weight_FC, None, False, True) if ctx.needs_input_grad[0] else None
    dweight_FC = run(invariant_product, dy_NF, x_NC, None, True, True) if ctx.needs_input_grad[1] else None
    dbias_F = dy_NF.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx_NC, dweight_FC, dbias_F, None, None


invariant_product.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, num_rows, width, wide in (
        (bf16, 1, 4096, 4096),
        (bf16, 64, 4096, 14336),
        (fp16, 256, 4096, 4096),
        (bf16, 1024, 4096, 4096),
        (bf16, 8192, 8192, 8192),
        (fp32, 1, 4096, 4096),
        (fp32, 4096, 4096, 4096),
    ):
        yield _sample("", dtype, (num_rows, width), (wide, width))
    yield _sample("bias ", fp16, (8192, 4096), (14336, 4096), bias=True)
    for dtype in (bf16, fp32):
        yield _sample("dx ", dtype, (8192, 14336), (14336, 4096), b_transposed=True)
        yield _sample("dw ", dtype, (8192, 14336), (8192, 4096), a_transposed=True, b_transposed=True)


def _sample(
    form: str,
    dtype: torch.dtype,
    a: tuple[int, int],
    b: tuple[int, int],
    *,
    bias: bool = False,
    a_transposed: bool = False,
    b_transposed: bool = False,
) -> Sample:
    tensors = meta(*a, dtype=dtype), meta(*b, dtype=dtype), meta(b[0], dtype=dtype) if bias else None
    call = partial(launch_product, *tensors, a_transposed=a_transposed, b_transposed=b_transposed)
    name = f"invariant_matmul {form}{a[0]}x{a[1]}, {b[0]}x{b[1]}"
    return Sample(name, dtype, call, tensor_cores=dtype != torch.float32)
