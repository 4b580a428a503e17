"""Distillation through the output layer: the student learns the teacher's distribution at a temperature.

    loss = sum over valid rows of T^2 KL(softmax(teacher / T) || softmax(student / T))

The student's logits are hidden weight^T + bias; the teacher's come from its own hidden states, of any width, and its
own output layer, or are given. As in `op.py`, a chunk of rows at a time: logits of both models, one kernel that
replaces the student's by their gradient (`divergence.py`), and the products for dhidden and dweight. Nothing flows to
the teacher.

Shapes: N rows (tokens), C width of the student, E of the teacher, V vocabulary of both.
FLOPs: 6 N C V + 2 N E V with gradients, 2 N (C + E) V without. Bytes beside the products' and dweight's (see `op.py`):
3 N V b to 5 N V b. Source: Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cross_entropy import cpu
from trine.kernels.cross_entropy.chunked import Head, in_place, run_chunks, scale_loss_gradients
from trine.kernels.cross_entropy.divergence import launch_distillation
from trine.kernels.cross_entropy.options import (
    check_chunk_rows,
    check_kernel_dtype,
    check_linear,
    check_softcap,
    default_chunk_rows,
)
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import uses_triton


def linear_distillation(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """The sum (not mean) over valid rows: a scalar in fp32 (or fp64).

    The teacher is `teacher_logits` [N, V], or `teacher_hidden` [N, E] with `teacher_weight` [V, E] and perhaps
    `teacher_bias` [V], multiplied in the dtype of teacher_hidden. `valid`: bool [N], all rows where None. The softcaps
    are those of the models, applied before the temperature. `chunk_rows` bounds the rows of logits in memory (default:
    half of `default_chunk_rows`, because there are two models). Raises ValueError for shapes that do not fit, a teacher
    missing or given twice, and values out of range.
    """
    check_linear(hidden_NC, weight_VC, bias)
    check_chunk_rows(chunk_rows)
    check_softcap("softcap", softcap)
    check_softcap("teacher_softcap", teacher_softcap)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    _check_teacher(hidden_NC, weight_VC, teacher_logits, teacher_hidden, teacher_weight, teacher_bias)
    if valid is not None and (valid.shape != hidden_NC.shape[:1] or valid.dtype != torch.bool):
        raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}; expected bool [{len(hidden_NC)}]")
    rows = chunk_rows or max(1, default_chunk_rows(len(weight_VC), hidden_NC.dtype, hidden_NC.device) // 2)
    teacher = [
        None if x is None else x.detach() for x in (teacher_logits, teacher_hidden, teacher_weight, teacher_bias)
    ]
    settings = float(temperature), softcap, teacher_softcap, rows
    if not uses_triton(hidden_NC):
        loss: Tensor = cpu.LinearDistillation.apply(  # type: ignore[no-untyped-call]
            hidden_NC, weight_VC, bias, *teacher, valid, *settings
        )
        return loss
    enabled = torch.is_grad_enabled()
    needed = [enabled and x is not None and x.requires_grad for x in (hidden_NC, weight_VC, bias)]
    found: Tensor = run(linear_distillation_forward, hidden_NC, weight_VC, bias, *teacher, valid, *settings, needed)[0]
    return found


def _check_teacher(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    logits: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    if logits is not None:
        if hidden is not None or weight is not None or bias is not None:
            raise ValueError("the teacher is given twice: leave out teacher_logits, or teacher_hidden and its layer")
        if logits.shape != (len(hidden_NC), len(weight_VC)) or not logits.is_floating_point():
            raise ValueError(
                f"teacher_logits is {logits.dtype} {tuple(logits.shape)}; expected floating point "
                f"[{len(hidden_NC)}, {len(weight_VC)}]"
            )
        check_kernel_dtype(logits, "teacher_logits")
        return
    if hidden is None or weight is None:
        raise ValueError("the teacher is missing: give teacher_logits, or teacher_hidden and teacher_weight")
    check_linear(hidden, weight, bias, "teacher_")
    if len(hidden) != len(hidden_NC) or len(weight) != len(weight_VC):
        raise ValueError(
            f"teacher_hidden {tuple(hidden.shape)} and teacher_weight {tuple(weight.shape)} do not fit; expected "
            f"[{len(hidden_NC)}, E] and [{len(weight_VC)}, E] for the student's rows and vocabulary"
        )


# --- Triton -----------------------------------------------------------------------------------------------------------


def _launch_forward(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    chunk_rows: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the rows, dhidden, dweight and dbias; empty where not needed."""
    head = Head.of(hidden_NC, weight_VC, bias)
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head.of(teacher_hidden, teacher_weight, teacher_bias)
        teacher_buffer = teacher.buffer(chunk_rows)
    elif teacher_logits is not None and teacher_logits.stride(1) != 1:
        teacher_logits = teacher_logits.contiguous()
    valid = None if valid is None else valid.contiguous()
    losses_N = hidden_NC.new_empty(len(hidden_NC), dtype=torch.float32)

    def replace(rows: slice, logits_nV: Tensor) -> None:
        teacher_nV = teacher.logits(rows, teacher_buffer) if teacher_logits is None else teacher_logits[rows]

        def kernel(stored_nV: Tensor) -> None:
            launch_distillation(
                stored_nV,
                teacher_nV,
                None if valid is None else valid[rows],
                losses_N[rows],
                stored_nV if any(needed) else None,
                temperature=temperature,
                softcap=softcap,
                teacher_softcap=teacher_softcap,
            )

        in_place(logits_nV, kernel)

    return losses_N, *run_chunks(head, chunk_rows, needed, replace)


@torch.library.custom_op("trine::linear_distillation_forward", mutates_args=())
def linear_distillation_forward(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    chunk_rows: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered operation: loss, and dhidden, dweight and dbias in fp32 where needed."""
    losses_N, dhidden, dweight, dbias = _launch_forward(
        hidden_NC, weight_VC, bias, teacher_logits, teacher_hidden, teacher_weight, teacher_bias, valid,
        temperature, softcap, teacher_softcap, chunk_rows, needed,
    )  # fmt: skip
    return losses_N.sum(), dhidden, dweight, dbias


@linear_distillation_forward.register_fake
def _(hidden_NC: Tensor, weight_VC: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needed = arguments[-1]
    dhidden = hidden_NC.new_empty(hidden_NC.shape if needed[0] else 0, dtype=torch.float32)
    dweight = hidden_NC.new_empty(weight_VC.shape if needed[1] else 0, dtype=torch.float32)
    dbias = hidden_NC.new_empty(len(weight_VC) if needed[2] else 0, dtype=torch.float32)
    return hidden_NC.new_empty((), dtype=torch.float32), dhidden, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_NC, weight_VC, bias = inputs[:3]
    ctx.needed = inputs[-1]
    ctx.dtypes = hidden_NC.dtype, weight_VC.dtype, weight_VC.dtype if bias is None else bias.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    scaled = run(scale_loss_gradients, dloss, *ctx.saved_tensors, *ctx.dtypes)
    wanted = (gradient if needed else None for gradient, needed in zip(scaled, ctx.needed, strict=True))
    return (*wanted, *(None,) * 10)


linear_distillation_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype in HALF_AND_SINGLE:
        yield _sample(1024, 4096, 128256, dtype, dtype, capped=False)
    yield _sample(1024, 2304, 256000, torch.bfloat16, torch.bfloat16, capped=True)
    yield _sample(1024, 768, 50257, torch.bfloat16, torch.float32, capped=False)


def _sample(
    rows: int, width: int, vocab_size: int, dtype: torch.dtype, teacher: torch.dtype, *, capped: bool
) -> Sample:
    hidden, weight = meta(rows, width, dtype=dtype), meta(vocab_size, width, dtype=dtype)
    logits, valid = meta(rows, vocab_size, dtype=teacher), meta(rows, dtype=torch.bool)
    softcap = 30.0 if capped else None
    arguments = (hidden, weight, None, logits, None, None, None, valid, 2.0, softcap, softcap, rows, [True] * 3)
    kind = " softcap" if capped else ""
    return Sample(f"distillation {rows}x{width}x{vocab_size}{kind}", dtype, partial(_launch_forward, *arguments))
