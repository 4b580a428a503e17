"""The output layer and its cross-entropy in one operation, so that the logits are never whole in memory.

    logits = hidden weight^T + bias        loss = sum over valid rows of logsumexp(logits) - logits[target]

with an ignored target, label smoothing, z-loss and softcap as `reference.py` has them, and the log-probabilities of the
targets (alone: `token_log_probs.py`). Gradients are computed in the forward, a chunk of rows at a time, while the
logits are there (`chunked.py`): dlogits = softmax(logits) - onehot(target) overwrites the logits, dhidden = dlogits
weight, dweight += dlogits^T hidden. The backward only scales them. Products run in the dtype of hidden, the softmax in
fp32; dweight is summed in fp32.

Shapes: N rows (tokens), C width, V vocabulary, n rows of a chunk, b bytes of a logit.
FLOPs: 6 N C V with gradients. By the usual count, which computes the logits again in the backward, these are 8 N C V.
Bytes on a GPU beside what the products read: the kernel reads the logits once from memory (the second time from L2
where they fit) and writes them, 2 N V b to 3 N V b; dweight is written by the first chunk and read and written by each
other, 4 C V (2 N / n - 1), and read once more when it is scaled.

So the share of dweight in the time of the products is 8 C V / bandwidth over 6 n C V / speed, whatever C and V: at
770 TFLOP/s and 4.3 TB/s (H200) it is 240 / n. 2048 rows make it 12 %, and are 4096 V bytes in half precision: 0.5 GiB
for V = 131072, beside 2 GiB of dweight for C = 4096. Wider vocabularies get fewer rows, so that a chunk has at most
1 GiB. For N = 8192, C = 4096, V = 131072 in bf16: products 34 ms, softmax 1.5 ms, dweight 3.5 ms, scaling 1 ms, cast of
fp32 weights 0.7 ms: 41 ms if all of it is as fast as alone; 64 ms are 550 TFLOP/s by the usual count. Not measured yet.

Without gradients, half precision runs `projection.py`: no logits in memory at all, and they are never rounded to half
precision, which log-probabilities would show (a logit of 20 is off by up to 0.06 in bf16). fp32 has no such gain and no
tensor cores for exact products: it takes chunks, multiplied by the library.

Source: Wijmans et al. 2024 (arXiv 2411.09009) for the idea.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cross_entropy import cpu
from trine.kernels.cross_entropy.chunked import Head, evaluate, in_place, run_chunks, scale_loss_gradients
from trine.kernels.cross_entropy.options import (
    LossOptions,
    check_chunk_rows,
    check_linear,
    check_targets,
    default_chunk_rows,
)
from trine.kernels.cross_entropy.rows import launch_rows
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import uses_triton


def linear_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum (not mean) of the cross-entropy over rows whose target is not `ignore_index`: a scalar in fp32 (or fp64).

    hidden in any float dtype (on a GPU not float64); weight and bias are cast to it, and their gradients have their own
    dtype; targets int64 in [0, V) or `ignore_index`. `chunk_rows` bounds the rows of logits in memory (default:
    `default_chunk_rows`). Raises ValueError for shapes that do not fit, options out of range, and on a CPU for a target
    out of range; on a GPU such a row gives NaN.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return _loss(hidden_NC, weight_VC, bias, targets_N, options, chunk_rows, with_log_probs=False)[0]


def linear_cross_entropy_and_log_probs(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and from the same logits each row's log p(target): fp32 (fp64) [N], 0 where ignored.

    The log-probabilities have no gradient; for that take `token_log_probs`.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return _loss(hidden_NC, weight_VC, bias, targets_N, options, chunk_rows, with_log_probs=True)


def _check(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    options: LossOptions,
    chunk_rows: int | None,
) -> int:
    """The rows of a chunk."""
    check_linear(hidden_NC, weight_VC, bias)
    check_targets(targets_N, len(hidden_NC), len(weight_VC), options.ignore_index)
    check_chunk_rows(chunk_rows)
    return chunk_rows or default_chunk_rows(len(weight_VC), hidden_NC.dtype, hidden_NC.device)


def _loss(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    options: LossOptions,
    chunk_rows: int | None,
    *,
    with_log_probs: bool,
) -> tuple[Tensor, Tensor]:
    rows = _check(hidden_NC, weight_VC, bias, targets_N, options, chunk_rows)
    if uses_triton(hidden_NC):
        enabled = torch.is_grad_enabled()
        needed = [enabled and x is not None and x.requires_grad for x in (hidden_NC, weight_VC, bias)]
        loss, log_probs_N, *_ = run(linear_cross_entropy_forward,
            hidden_NC, weight_VC, bias, targets_N,
            options.ignore_index, options.label_smoothing, options.z_loss, options.softcap, rows, needed,
        )  # fmt: skip
        return loss, log_probs_N
    both: tuple[Tensor, Tensor] = cpu.LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NC, weight_VC, bias, targets_N, options, rows, with_log_probs
    )
    return both


# --- Triton -----------------------------------------------------------------------------------------------------------


def _launch_forward(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    options: LossOptions,
    chunk_rows: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, log-probabilities, dhidden, dweight and dbias; empty where not needed."""
    head, targets_N = Head.of(hidden_NC, weight_VC, bias), targets_N.contiguous()
    if any(needed):
        losses_N, log_probs_N = (hidden_NC.new_empty(len(hidden_NC), dtype=torch.float32) for _ in range(2))

        def replace(rows: slice, logits_nV: Tensor) -> None:
            def kernel(stored_nV: Tensor) -> None:
                launch_rows(
                    stored_nV, targets_N[rows], options,
                    dlogits_NV=stored_nV, losses_N=losses_N[rows], log_probs_N=log_probs_N[rows],
                )  # fmt: skip

            in_place(logits_nV, kernel)

        return losses_N, log_probs_N, *run_chunks(head, chunk_rows, needed, replace)
    losses_N, log_probs_N = evaluate(head, targets_N, options, chunk_rows)
    dhidden, dweight, dbias = (hidden_NC.new_empty(0, dtype=torch.float32) for _ in range(3))
    return losses_N, log_probs_N, dhidden, dweight, dbias


@torch.library.custom_op("trine::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_rows: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered operation: loss, log_probs_N, and dhidden, dweight and dbias in fp32 where needed."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    losses_N, log_probs_N, dhidden, dweight, dbias = _launch_forward(
        hidden_NC, weight_VC, bias, targets_N, options, chunk_rows, needed
    )
    return losses_N.sum(), log_probs_N, dhidden, dweight, dbias


@linear_cross_entropy_forward.register_fake
def _(
    hidden_NC: Tensor, weight_VC: Tensor, bias: Tensor | None, targets_N: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needed = arguments[-1]
    loss, log_probs_N = (
        hidden_NC.new_empty((), dtype=torch.float32),
        hidden_NC.new_empty(len(hidden_NC), dtype=torch.float32),
    )
    dhidden = hidden_NC.new_empty(hidden_NC.shape if needed[0] else 0, dtype=torch.float32)
    dweight = hidden_NC.new_empty(weight_VC.shape if needed[1] else 0, dtype=torch.float32)
    dbias = hidden_NC.new_empty(len(weight_VC) if needed[2] else 0, dtype=torch.float32)
    return loss, log_probs_N, dhidden, dweight, dbias


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_NC, weight_VC, bias = inputs[:3]
    ctx.needed = inputs[-1]
    ctx.dtypes = hidden_NC.dtype, weight_VC.dtype, weight_VC.dtype if bias is None else bias.dtype
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients = ctx.saved_tensors
    if dloss is None:
        return (None,) * 10
    scaled = run(scale_loss_gradients, dloss, *gradients, *ctx.dtypes)
    wanted = (gradient if needed else None for gradient, needed in zip(scaled, ctx.needed, strict=True))
    return (*wanted, *(None,) * 7)


linear_cross_entropy_forward.register_autograd(_loss_backward, setup_context=_loss_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    everything = LossOptions(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    for dtype in HALF_AND_SINGLE:
        yield _sample("linear_cross_entropy", (2048, 4096, 128256), dtype, LossOptions())
    yield _sample("linear_cross_entropy all", (2048, 4096, 128256), torch.bfloat16, everything)
    yield _sample("linear_cross_entropy all", (1024, 4096, 262144), torch.float32, everything)
    yield _sample("linear_cross_entropy", (2048, 768, 50257), torch.bfloat16, LossOptions())
    # The products of an evaluation are among the samples of `token_log_probs.py`.
    yield _sample("linear_cross_entropy evaluation", (2048, 4096, 128256), torch.float32, everything, needed=False)


def _sample(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, options: LossOptions, *, needed: bool = True
) -> Sample:
    rows, width, vocab_size = shape
    hidden, weight = meta(rows, width, dtype=dtype), meta(vocab_size, width, dtype=dtype)
    targets = meta(rows, dtype=torch.int64)
    call = partial(_launch_forward, hidden, weight, None, targets, options, rows, [needed] * 3)
    return Sample(f"{name} {rows}x{width}x{vocab_size}", dtype, call)
