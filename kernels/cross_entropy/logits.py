"""The cross-entropy of logits that are in memory, with the options of `reference.py`.

    loss = sum over valid rows of logsumexp(logits) - logits[target]        dlogits = softmax(logits) - onehot(target)

One Triton kernel (`rows.py`) reads the logits once in the forward, which keeps one number per row, and reads them again
and writes the gradient in the backward: 3 N V b bytes in all for N V numbers of b bytes. Where the logits come out of
the output layer, `op.py` needs neither them nor their gradient whole.

Shapes: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cross_entropy import cpu
from trine.kernels.cross_entropy.chunked import in_place
from trine.kernels.cross_entropy.options import LossOptions, check_kernel_dtype, check_targets
from trine.kernels.cross_entropy.rows import launch_rows
from trine.kernels.launch import result_dtype, rounded
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import uses_triton


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> Tensor:
    """Sum (not mean) of the cross-entropy over rows whose target is not `ignore_index`: a scalar in fp32 (or fp64).

    logits in any float dtype (on a GPU not float64); targets int64 in [0, V) or `ignore_index`. With `inplace` the
    backward writes the gradient over the logits: for logits that nothing reads afterwards, and that are no leaf. A
    second backward through them, or through another operation that kept them, is refused by torch. Raises ValueError
    for shapes that do not fit, options out of range, and on a CPU for a target out of range; on a GPU such a row gives
    NaN.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return _loss(logits_NV, targets_N, options, inplace)[0]


def cross_entropy_and_log_probs(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy`, and each row's log p(target): fp32 (fp64) [N], 0 if ignored, without a gradient."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return _loss(logits_NV, targets_N, options, inplace)


def _loss(logits_NV: Tensor, targets_N: Tensor, options: LossOptions, inplace: bool) -> tuple[Tensor, Tensor]:
    if logits_NV.dim() != 2 or logits_NV.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits_NV.shape)}; expected [N, V] with V at least 1")
    if not logits_NV.is_floating_point():
        raise ValueError(f"logits are {logits_NV.dtype}; they must be floating point")
    check_kernel_dtype(logits_NV, "logits")
    check_targets(targets_N, len(logits_NV), logits_NV.shape[1], options.ignore_index)
    if inplace and torch.is_grad_enabled() and logits_NV.requires_grad and logits_NV.is_leaf:
        raise ValueError("inplace is True but the logits are a leaf, whose values would be lost; leave it False")
    if inplace and 0 in logits_NV.stride():
        raise ValueError("inplace is True but the logits are expanded, so that rows share memory; leave it False")
    if uses_triton(logits_NV):
        loss, log_probs_N, _ = run(cross_entropy_forward,
            logits_NV, targets_N,
            options.ignore_index, options.label_smoothing, options.z_loss, options.softcap, inplace,
        )  # fmt: skip
        return loss, log_probs_N
    both: tuple[Tensor, Tensor] = cpu.CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_NV, targets_N, options, inplace
    )
    return both


# --- Triton -----------------------------------------------------------------------------------------------------------


def _rows(logits_NV: Tensor) -> Tensor:
    """Rows may be apart, but not their numbers."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _launch_forward(logits_NV: Tensor, targets_N: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-probabilities and log-sum-exps of the rows."""
    losses_N, log_probs_N, lse_N = (logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(3))
    results = {"losses_N": losses_N, "log_probs_N": log_probs_N, "lse_N": lse_N}
    launch_rows(_rows(logits_NV), targets_N.contiguous(), options, **results)
    return losses_N, log_probs_N, lse_N


def _launch_backward(
    dloss: Tensor, logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, options: LossOptions
) -> Tensor:
    dlogits_NV = logits_NV.new_empty(logits_NV.shape, dtype=result_dtype(logits_NV.dtype))
    known = {"lse_N": lse_N, "scales": dloss, "dlogits_NV": dlogits_NV}
    launch_rows(_rows(logits_NV), targets_N.contiguous(), options, **known)
    return rounded(dlogits_NV, logits_NV.dtype)


@torch.library.custom_op("trine::cross_entropy_forward", mutates_args=())
def cross_entropy_forward(
    logits_NV: Tensor,
    targets_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: loss, log_probs_N, lse_N. `inplace` is for the backward."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    losses_N, log_probs_N, lse_N = _launch_forward(logits_NV, targets_N, options)
    return losses_N.sum(), log_probs_N, lse_N


@cross_entropy_forward.register_fake
def _(logits_NV: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_probs_N, lse_N = (logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(2))
    return logits_NV.new_empty((), dtype=torch.float32), log_probs_N, lse_N


@torch.library.custom_op("trine::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    dloss: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    """The registered operation: dlogits."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return _launch_backward(dloss, logits_NV, targets_N, lse_N, options)


@cross_entropy_backward.register_fake
def _(dloss: Tensor, logits_NV: Tensor, *_: Any) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape)


@torch.library.custom_op("trine::cross_entropy_backward_in_place", mutates_args=("logits_NV",))
def cross_entropy_backward_in_place(
    dloss: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """The registered operation: dlogits over the logits."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    if logits_NV.stride(1) != 1:
        logits_NV.copy_(_launch_backward(dloss, logits_NV, targets_N, lse_N, options))
        return

    def kernel(stored_NV: Tensor) -> None:
        known = {"lse_N": lse_N, "scales": dloss, "dlogits_NV": stored_NV}
        launch_rows(stored_NV, targets_N.contiguous(), options, **known)

    in_place(logits_NV, kernel)


@cross_entropy_backward_in_place.register_fake
def _(dloss: Tensor, logits_NV: Tensor, *_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_NV, targets_N, *ctx.options, ctx.inplace = inputs
    ctx.save_for_backward(logits_NV, targets_N, output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    logits_NV, targets_N, lse_N = ctx.saved_tensors
    if dloss is None:
        return (None,) * 7
    if not ctx.inplace:
        return run(cross_entropy_backward, dloss, logits_NV, targets_N, lse_N, *ctx.options), *(None,) * 6
    cross_entropy_backward_in_place(dloss, logits_NV, targets_N, lse_N, *ctx.options)
    return logits_NV, *(None,) * 6


cross_entropy_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    everything = LossOptions(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    for dtype in HALF_AND_SINGLE:
        yield from _sample_pair(8192, 128256, dtype, LossOptions(), "cross_entropy")
    yield from _sample_pair(8192, 262144, torch.bfloat16, everything, "cross_entropy all")
    yield from _sample_pair(8192, 50257, torch.bfloat16, LossOptions(), "cross_entropy")
    yield from _sample_pair(65536, 320, torch.float32, LossOptions(), "cross_entropy")


def _sample_pair(rows: int, vocab_size: int, dtype: torch.dtype, options: LossOptions, name: str) -> Iterator[Sample]:
    logits, targets = meta(rows, vocab_size, dtype=dtype), meta(rows, dtype=torch.int64)
    shape = f"{rows}x{vocab_size}"
    yield Sample(f"{name} {shape}", dtype, partial(_launch_forward, logits, targets, options))
    backward = partial(_launch_backward, meta(1)[0], logits, targets, meta(rows), options)
    yield Sample(f"{name} backward {shape}", dtype, backward)
