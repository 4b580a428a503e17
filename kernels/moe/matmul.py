"""Grouped matrix product: y[r] = x[row of r] W[e]^T + b[e] for every row r of expert e, with gradients.

    dx[r] = dy[r] W[e]  (summed over a token's slots where x holds tokens)
    dW[e] = sum over rows of dy[r]^T x[row of r]        db[e] = sum over rows of dy[r]

The building block of layers with experts of another kind; `op.moe_mlp` is the whole feed-forward layer with less
memory. Kernels and their costs: `product.py` (forward and dx, 2 P C F operations each), `weight_gradient.py` (the
same).

Shapes: N tokens, K slots, P = N K rows in grouped order (`groups.py`), E experts, C inner size, F columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trine.kernels.joined import linear
from trine.kernels.moe.combine import launch_combine
from trine.kernels.moe.groups import Groups, meta_groups
from trine.kernels.moe.product import launch_clear, launch_product
from trine.kernels.moe.weight_gradient import launch_bias_gradient, launch_weight_gradient
from trine.kernels.operation import run
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul_reference(
    x: Tensor, weight_EFC: Tensor, groups: Groups, *, bias_EF: Tensor | None = None, gather: bool = True
) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    return _by_loop(work, weight_EFC, groups, bias_EF, gather).to(x.dtype)


def grouped_matmul(
    x: Tensor, weight_EFC: Tensor, groups: Groups, *, bias_EF: Tensor | None = None, gather: bool = True
) -> Tensor:
    """y_PF in grouped order and the dtype of x; rows of no expert are zero.

    With `gather` x is [N, C], a row for each token; without it [P, C], already in grouped order. Weights and bias may
    be of any float dtype: they are cast to that of x, and their gradients have their own. Raises ValueError for shapes
    that do not fit each other or the groups, numbers that are not floating point, and on a GPU for float64.
    """
    _check(x, weight_EFC, groups, bias_EF, gather)
    if uses_triton(x):
        check_kernel_dtype(x)
        y_PF: Tensor = run(grouped_matmul_forward, x, weight_EFC, bias_EF, *groups, gather)
        return y_PF
    return _by_loop(x, weight_EFC, groups, bias_EF, gather)


def check_kernel_dtype(x: Tensor) -> None:
    """Raises ValueError for a dtype that the kernels do not have."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{x.dtype} is not supported by the kernel; use float32, bfloat16 or float16")


def _check(x: Tensor, weight_EFC: Tensor, groups: Groups, bias_EF: Tensor | None, gather: bool) -> None:
    num_pairs = len(groups.pair_P)
    rows = num_pairs // groups.num_slots if gather else num_pairs
    if weight_EFC.dim() != 3 or weight_EFC.shape[0] != groups.num_experts:
        raise ValueError(
            f"weight has shape {tuple(weight_EFC.shape)}; expected [{groups.num_experts}, F, C] for these groups"
        )
    _, wide, width = weight_EFC.shape
    if tuple(x.shape) != (rows, width):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight_EFC.shape)}; expected x of {(rows, width)} "
            f"for these groups with gather={gather}"
        )
    if bias_EF is not None and tuple(bias_EF.shape) != (groups.num_experts, wide):
        raise ValueError(f"bias has shape {tuple(bias_EF.shape)}; expected {(groups.num_experts, wide)}")
    for name, tensor in (("x", x), ("weight", weight_EFC), ("bias", bias_EF)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be floating point")


# --- CPU --------------------------------------------------------------------------------------------------------------


def expert_rows(groups: Groups) -> Iterator[tuple[int, Tensor]]:
    """Every expert that has rows, with the pairs of its rows; waits for a GPU.

    Where none has any the first comes without rows, so that results still depend on every input.
    """
    ends = groups.offset.tolist()
    for expert, (first, last) in enumerate(pairwise(ends)):
        if first < last or (expert == 0 and ends[-1] == 0):
            yield expert, groups.pair_P[first:last]


def unbound(tensor: Tensor | None, num_experts: int) -> Sequence[Tensor | None]:
    """A tensor for each expert. Unbinding has one gradient for all; indexing would have one of full size for each."""
    return [None] * num_experts if tensor is None else tensor.unbind(0)


def in_grouped_order(parts: Sequence[Tensor], num_pairs: int, like: Tensor) -> Tensor:
    """The experts' results one below the other, and zeros for the rows of no expert."""
    missing = num_pairs - sum(len(part) for part in parts)
    tail = [like] if missing == 0 else [like.new_zeros(missing, like.shape[1])]
    return torch.cat([*parts, *tail])


def _by_loop(x: Tensor, weight_EFC: Tensor, groups: Groups, bias_EF: Tensor | None, gather: bool) -> Tensor:
    weights = weight_EFC.unbind(0)
    biases = unbound(bias_EF, groups.num_experts)
    parts, first = [], 0
    for expert, pairs in expert_rows(groups):
        last = first + len(pairs)
        rows = x.index_select(0, pairs // groups.num_slots) if gather else x[first:last]
        parts.append(linear(rows, weights[expert], biases[expert]))
        first = last
    return in_grouped_order(parts, len(groups.pair_P), x.new_empty(0, weight_EFC.shape[1]))


# --- Triton -----------------------------------------------------------------------------------------------------------


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the activations; strides stay."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _launch_forward(x: Tensor, weight_EFC: Tensor, bias_EF: Tensor | None, groups: Groups, gather: bool) -> Tensor:
    """y_PF."""
    bias_EF = None if bias_EF is None else cast(bias_EF, x.dtype)
    y_PF = launch_product(x.contiguous(), cast(weight_EFC, x.dtype), groups, gather=gather, bias_EF=bias_EF)
    launch_clear(y_PF, groups)
    return y_PF


def _launch_backward(
    dy_PF: Tensor,
    x: Tensor,
    weight_EFC: Tensor,
    bias_EF: Tensor | None,
    groups: Groups,
    gather: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, weight and bias; an empty tensor where there is or is needed none."""
    x, dy_PF = x.contiguous(), dy_PF.contiguous()
    gradients = [x.new_empty(0) for _ in range(3)]
    if needed[0]:
        dx = launch_product(dy_PF, cast(weight_EFC, x.dtype), groups, gather=False, transposed=True)
        if gather:
            dx = launch_combine(dx, None, groups)
        else:
            launch_clear(dx, groups)
        gradients[0] = dx
    if needed[1]:
        gradients[1] = launch_weight_gradient(dy_PF, x, groups, weight_EFC.dtype, gather_right=gather)
    if needed[2] and bias_EF is not None:
        gradients[2] = launch_bias_gradient(dy_PF, groups, bias_EF.dtype)
    return gradients


@torch.library.custom_op("trine::grouped_matmul", mutates_args=())
def grouped_matmul_forward(
    x: Tensor,
    weight_EFC: Tensor,
    bias_EF: Tensor | None,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
    gather: bool,
) -> Tensor:
    """The registered operation: y_PF."""
    return _launch_forward(x, weight_EFC, bias_EF, Groups(pair_P, row_P, offset, num_slots), gather)


@grouped_matmul_forward.register_fake
def _(x: Tensor, weight_EFC: Tensor, bias_EF: Tensor | None, pair_P: Tensor, *_: Any) -> Tensor:
    return x.new_empty(pair_P.shape[0], weight_EFC.shape[1])


@torch.library.custom_op("trine::grouped_matmul_backward", mutates_args=())
def grouped_matmul_backward(
    dy_PF: Tensor,
    x: Tensor,
    weight_EFC: Tensor,
    bias_EF: Tensor | None,
    pair_P: Tensor,
    row_P: Tensor,
    offset: Tensor,
    num_slots: int,
    gather: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The registered operation: three gradients, in the order of the forward's arguments."""
    groups = Groups(pair_P, row_P, offset, num_slots)
    return _launch_backward(dy_PF, x, weight_EFC, bias_EF, groups, gather, needed)


@grouped_matmul_backward.register_fake
def _(dy_PF: Tensor, x: Tensor, weight_EFC: Tensor, bias_EF: Tensor | None, *arguments: Any) -> list[Tensor]:
    return fake_gradients((x, weight_EFC, bias_EF), arguments[-1])


def fake_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Gradients by shape: like their inputs where needed, else empty in the dtype of the first."""
    first = inputs[0]
    assert first is not None
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and wanted
        else first.new_empty(0)
        for tensor, wanted in zip(inputs, needed, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_slots, ctx.gather = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy_PF: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = [t is not None and wanted for t, wanted in zip(tensors[:3], ctx.needs_input_grad[:3], strict=True)]
    gradients = run(grouped_matmul_backward, dy_PF, *tensors, ctx.num_slots, ctx.gather, needed)
    given = (gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))
    return (*given, None, None, None, None, None)


grouped_matmul_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype, tokens, slots, experts, width, wide in (
        (torch.bfloat16, 8192, 2, 8, 4096, 14336),
        (torch.float16, 4096, 8, 128, 2048, 768),
        (torch.float32, 4096, 8, 128, 2048, 768),
    ):
        groups, shape = meta_groups(tokens, slots, experts), f"{tokens}x{slots} of {experts}, {width}x{wide}"
        x, weight, bias = meta(tokens, width, dtype=dtype), meta(experts, wide, width, dtype=dtype), meta(experts, wide)
        half = dtype != torch.float32
        yield Sample(f"grouped_matmul {shape}", dtype, partial(launch_product, x, weight, groups, gather=True), half)
        dy = meta(tokens * slots, wide, dtype=dtype)
        backward = partial(launch_product, dy, weight, groups, gather=False, transposed=True)
        yield Sample(f"grouped_matmul dx {shape}", dtype, backward, half)
        gradient = partial(launch_weight_gradient, dy, x, groups, dtype, gather_right=True)
        yield Sample(f"grouped_matmul dweight {shape}", dtype, gradient, half)
        rows = partial(launch_weight_gradient, dy, meta(tokens * slots, width, dtype=dtype), groups, dtype)
        yield Sample(f"grouped_matmul dweight of rows {shape}", dtype, rows, half)
        yield Sample(f"grouped_matmul dbias {shape}", dtype, partial(launch_bias_gradient, dy, groups, bias.dtype))
