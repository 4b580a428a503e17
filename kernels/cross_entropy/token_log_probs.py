"""The log-probability of each row's target, from the output layer's input: for evaluation and for policies.

    log_probs = logits[target] - logsumexp(logits)        logits = hidden weight^T + bias, capped where wished

Differentiable: the backward computes the logits again, a chunk of rows at a time, multiplies the gradient of each row
by what comes in and goes on as `op.py` does. So no more than a chunk of logits is ever in memory.

Shapes: N rows (tokens), C width, V vocabulary. FLOPs: 2 N C V forward, 6 N C V backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cross_entropy import cpu
from trine.kernels.cross_entropy.chunked import Head, evaluate, in_place, run_chunks
from trine.kernels.cross_entropy.options import (
    LossOptions,
    check_chunk_rows,
    check_linear,
    check_targets,
    default_chunk_rows,
)
from trine.kernels.cross_entropy.projection import launch_merge, launch_parts
from trine.kernels.cross_entropy.rows import launch_rows
from trine.kernels.operation import run
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton


def token_log_probs(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Each row's log p(target): fp32 [N] (fp64 for fp64 inputs), 0 where the target is `ignore_index`.

    Differentiable: the backward computes the logits again, a chunk at a time (8 N C V operations in all). Arguments and
    errors as for `op.linear_cross_entropy`.
    """
    options = LossOptions(ignore_index=ignore_index, softcap=softcap)
    check_linear(hidden_NC, weight_VC, bias)
    check_targets(targets_N, len(hidden_NC), len(weight_VC), ignore_index)
    check_chunk_rows(chunk_rows)
    rows = chunk_rows or default_chunk_rows(len(weight_VC), hidden_NC.dtype, hidden_NC.device)
    tensors = hidden_NC, weight_VC, bias, targets_N
    if uses_triton(hidden_NC):
        on_gpu_N: Tensor = run(token_log_probs_forward, *tensors, ignore_index, softcap, rows)
        return on_gpu_N
    found_N: Tensor = cpu.TokenLogProbs.apply(*tensors, options, rows)  # type: ignore[no-untyped-call]
    return found_N


# --- Triton -----------------------------------------------------------------------------------------------------------


def _launch_backward(
    dlog_probs_N: Tensor,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    options: LossOptions,
    chunk_rows: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias in the dtypes of their tensors; empty where not needed."""
    head, targets_N, scales_N = Head.of(hidden_NC, weight_VC, bias), targets_N.contiguous(), -dlog_probs_N
    unused_N = torch.empty_like(scales_N)

    def replace(rows: slice, logits_nV: Tensor) -> None:
        def kernel(stored_nV: Tensor) -> None:
            launch_rows(
                stored_nV, targets_N[rows], options,
                dlogits_NV=stored_nV, losses_N=unused_N[rows], log_probs_N=unused_N[rows], scales=scales_N[rows],
            )  # fmt: skip

        in_place(logits_nV, kernel)

    dhidden, dweight, dbias = run_chunks(head, chunk_rows, needed, replace)
    bias_dtype = hidden_NC.dtype if bias is None else bias.dtype
    return dhidden.to(hidden_NC.dtype), dweight.to(weight_VC.dtype), dbias.to(bias_dtype)


@torch.library.custom_op("trine::token_log_probs_forward", mutates_args=())
def token_log_probs_forward(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_rows: int,
) -> Tensor:
    """The registered operation: log-probabilities, fp32 [N]."""
    options = LossOptions(ignore_index=ignore_index, softcap=softcap)
    head = Head.of(hidden_NC, weight_VC, bias)
    return evaluate(head, targets_N.contiguous(), options, chunk_rows)[1]


@token_log_probs_forward.register_fake
def _(hidden_NC: Tensor, *_: Any) -> Tensor:
    return hidden_NC.new_empty(len(hidden_NC), dtype=torch.float32)


@torch.library.custom_op("trine::token_log_probs_backward", mutates_args=())
def token_log_probs_backward(
    dlog_probs_N: Tensor,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_rows: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: dhidden, dweight and dbias, empty where not needed."""
    options = LossOptions(ignore_index=ignore_index, softcap=softcap)
    return _launch_backward(dlog_probs_N, hidden_NC, weight_VC, bias, targets_N, options, chunk_rows, needed)


@token_log_probs_backward.register_fake
def _(
    dlog_probs_N: Tensor, hidden_NC: Tensor, weight_VC: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = (
        x.new_empty(x.shape) if x is not None and needed else hidden_NC.new_empty(0)
        for x, needed in zip((hidden_NC, weight_VC, bias), arguments[-1], strict=True)
    )
    return dhidden, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, ctx.softcap, ctx.chunk_rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dlog_probs_N: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gradients = run(
        token_log_probs_backward, dlog_probs_N, *tensors, ctx.ignore_index, ctx.softcap, ctx.chunk_rows, needed
    )
    wanted = (gradient if want else None for gradient, want in zip(gradients, needed, strict=True))
    return (*wanted, *(None,) * 4)


token_log_probs_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    usual, capped = LossOptions(), LossOptions(softcap=30.0)
    for dtype in (torch.bfloat16, torch.float16):
        yield _sample((2048, 4096, 128256), dtype, usual)
        yield _sample((16, 4096, 128256), dtype, usual)
    yield _sample((2048, 2304, 256000), torch.bfloat16, capped)
    yield _sample((4096, 768, 50257), torch.bfloat16, LossOptions(label_smoothing=0.1, softcap=30.0))
    parts: dict[str, Tensor | None] = {name: meta(32, 8192) for name in ("tops_ptr", "totals_ptr", "picked_ptr")}
    targets = meta(8192, dtype=torch.int64)
    for name, sums, options in (("", None, usual), (" all", meta(32, 8192), LossOptions(-100, 0.1, 1e-4, 30.0))):
        merge = partial(launch_merge, {**parts, "sums_ptr": sums}, targets, 128256, options)
        yield Sample(f"linear_cross_entropy merge{name} 8192", torch.float32, merge)


def _sample(shape: tuple[int, int, int], dtype: torch.dtype, options: LossOptions) -> Sample:
    rows, width, vocab_size = shape
    tensors = meta(rows, width, dtype=dtype), meta(vocab_size, width, dtype=dtype)
    bias = meta(vocab_size, dtype=dtype) if options.softcap else None
    call = partial(launch_parts, *tensors, bias, meta(rows, dtype=torch.int64), options)
    kind = "".join(f" {name}" for name in ("softcap", "label_smoothing") if getattr(options, name))
    return Sample(f"linear_cross_entropy parts {rows}x{width}x{vocab_size}{kind}", dtype, call, tensor_cores=True)
