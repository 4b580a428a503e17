"""The losses in plain PyTorch, in chunks of rows: what runs on a CPU.

As on a GPU, the gradients of the linear losses are computed chunk by chunk in the forward, while the logits are there,
and only scaled in the backward. `token_log_probs` computes its logits again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cross_entropy.options import LossOptions, chunks, work_dtype
from trine.kernels.cross_entropy.reference import capped, divergence, project

# Rows of a softmax at a time: its fp32 numbers should stay in the last-level cache between the passes.
_SOFTMAX_ROWS = 256


def _softmax_chunks(logits_nV: Tensor) -> Iterator[slice]:
    return chunks(len(logits_nV), _SOFTMAX_ROWS)


def log_probs(logits_nV: Tensor, targets_n: Tensor, options: LossOptions) -> Tensor:
    """Log-probability of each target, 0 where ignored: fp32 (or fp64) [n]."""
    parts = []
    for rows in _softmax_chunks(logits_nV):
        s_rV = capped(logits_nV[rows].to(work_dtype(logits_nV.dtype)), options.softcap)
        log_probs_rV = torch.log_softmax(s_rV, dim=-1)
        valid_r = targets_n[rows] != options.ignore_index
        found_r = log_probs_rV.gather(1, torch.where(valid_r, targets_n[rows], 0)[:, None])[:, 0]
        parts.append(torch.where(valid_r, found_r, 0))
    return torch.cat(parts) if parts else logits_nV.new_zeros(0, dtype=work_dtype(logits_nV.dtype))


def loss_of_logits(
    logits_nV: Tensor, targets_n: Tensor, options: LossOptions, log_probs_n: Tensor | None = None
) -> Tensor:
    """The loss summed over valid rows; each row's log-probability goes into `log_probs_n`."""
    if not options.label_smoothing and not options.z_loss:
        found_n = log_probs(logits_nV, targets_n, options)
        if log_probs_n is not None:
            log_probs_n.copy_(found_n)
        return -found_n.sum()
    total = torch.zeros((), dtype=work_dtype(logits_nV.dtype), device=logits_nV.device)
    for rows in _softmax_chunks(logits_nV):
        s_rV = capped(logits_nV[rows].to(total.dtype), options.softcap)
        valid_r1, safe_r1 = _valid(targets_n[rows], options)
        found_r1, loss_r1, _ = _loss_rows(s_rV, torch.log_softmax(s_rV, dim=-1), valid_r1, safe_r1, options)
        total += loss_r1.sum()
        if log_probs_n is not None:
            log_probs_n[rows] = found_r1[:, 0]
    return total


def _loss_rows(
    s_rV: Tensor, log_probs_rV: Tensor, valid_r1: Tensor, safe_r1: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability and loss of each row, 0 where ignored, and the log-sum-exp where z_loss needs it; all [r, 1]."""
    picked_r1 = log_probs_rV.gather(1, safe_r1)
    found_r1 = torch.where(valid_r1, picked_r1, 0)
    if not options.label_smoothing and not options.z_loss:
        return found_r1, -found_r1, None
    loss_r1, lse_r1 = -picked_r1, None
    if options.label_smoothing:
        loss_r1 = -torch.lerp(picked_r1, log_probs_rV.mean(dim=-1, keepdim=True), options.label_smoothing)
    if options.z_loss:
        lse_r1 = torch.logsumexp(s_rV, dim=-1, keepdim=True)
        loss_r1 = loss_r1 + options.z_loss * lse_r1.square()
    return found_r1, torch.where(valid_r1, loss_r1, 0), lse_r1


def _valid(targets_r: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Whether each row counts, and a target that can be looked up even where it does not; both [r, 1]."""
    valid_r1 = (targets_r != options.ignore_index)[:, None]
    return valid_r1, torch.where(valid_r1, targets_r[:, None], 0)


def replace_by_gradient(
    logits_nV: Tensor,
    targets_n: Tensor,
    options: LossOptions,
    *,
    dbias_V: Tensor | None = None,
    log_probs_n: Tensor | None = None,
    scales_n: Tensor | None = None,
) -> Tensor:
    """Overwrite logits with the loss's gradient (0 in ignored rows), add its column sums to dbias; returns the loss.

    `scales_n` multiplies the gradient of each row.
    """
    total = torch.zeros((), dtype=work_dtype(logits_nV.dtype), device=logits_nV.device)
    for rows in _softmax_chunks(logits_nV):
        found_r1, loss_r1, dlogits_rV = _loss_and_gradient(logits_nV[rows], targets_n[rows], options)
        total += loss_r1.sum()
        if log_probs_n is not None:
            log_probs_n[rows] = found_r1[:, 0]
        if scales_n is not None:
            dlogits_rV.mul_(scales_n[rows, None])
        if dbias_V is not None:
            dbias_V += dlogits_rV.sum(dim=0)
        logits_nV[rows] = dlogits_rV
        del dlogits_rV  # its memory is the next rows'
    return total


def _loss_and_gradient(logits_rV: Tensor, targets_r: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and loss of each row, [r, 1], and the gradient of its logits in fp32 (or fp64)."""
    s_rV = capped(logits_rV.to(work_dtype(logits_rV.dtype)), options.softcap)
    log_probs_rV = torch.log_softmax(s_rV, dim=-1)
    valid_r1, safe_r1 = _valid(targets_r, options)
    found_r1, loss_r1, lse_r1 = _loss_rows(s_rV, log_probs_rV, valid_r1, safe_r1, options)
    return found_r1, loss_r1, _gradient_rows(s_rV, log_probs_rV.exp_(), lse_r1, valid_r1, safe_r1, options)


def _gradient_rows(
    s_rV: Tensor, probs_rV: Tensor, lse_r1: Tensor | None, valid_r1: Tensor, safe_r1: Tensor, options: LossOptions
) -> Tensor:
    """The gradient of each row by its logits, in the memory of the probabilities."""
    dlogits_rV = probs_rV
    if lse_r1 is not None:
        dlogits_rV.mul_(1 + 2 * options.z_loss * lse_r1)
    if options.label_smoothing:
        dlogits_rV.sub_(options.label_smoothing / s_rV.shape[1])
    hit = options.label_smoothing - 1
    dlogits_rV.scatter_add_(1, safe_r1, torch.full_like(safe_r1, hit, dtype=dlogits_rV.dtype))
    if options.softcap is not None:
        dlogits_rV.mul_(1 - (s_rV / options.softcap).square_())
    if not bool(valid_r1.all()):
        dlogits_rV.masked_fill_(~valid_r1, 0)
    return dlogits_rV


class LinearCrossEntropy(torch.autograd.Function):
    """(loss, log-probabilities of the targets); the latter without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        options: LossOptions,
        chunk_rows: int,
        with_log_probs: bool,
    ) -> tuple[Tensor, Tensor]:
        """See the module's docstring. The log-probabilities are empty where they are not wanted."""
        dtype = hidden_NC.dtype
        work = work_dtype(dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight, bias = _cast(dtype, weight_VC, bias_V)
        gradients = Gradients(hidden_NC, weight_VC, bias_V, (wants_hidden, wants_weight, wants_bias))
        log_probs_N = torch.empty(len(hidden_NC) if with_log_probs else 0, dtype=work, device=hidden_NC.device)
        total = torch.zeros((), dtype=work, device=hidden_NC.device)
        for rows in chunks(hidden_NC.shape[0], chunk_rows):
            hidden_nC, targets_n = hidden_NC[rows], targets_N[rows]
            logits_nV = F.linear(hidden_nC, weight, bias)
            log_probs_n = log_probs_N[rows] if with_log_probs else None
            if not any((wants_hidden, wants_weight, wants_bias)):
                total += loss_of_logits(logits_nV, targets_n, options, log_probs_n)
                continue
            total += replace_by_gradient(
                logits_nV, targets_n, options, dbias_V=gradients.dbias_V, log_probs_n=log_probs_n
            )
            gradients.add(rows, logits_nV, hidden_nC, weight)
        ctx.save_for_backward(gradients.dhidden_NC, gradients.dweight_VC, gradients.dbias_V)
        ctx.dtypes = (dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(log_probs_N)
        return total, log_probs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients."""
        return (*_scaled(ctx, grads[0]), None, None, None, None)


class TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of the targets, with a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        options: LossOptions,
        chunk_rows: int,
    ) -> Tensor:
        """Computes the logits, in chunks."""
        ctx.save_for_backward(hidden_NC, weight_VC, bias_V, targets_N)
        ctx.options, ctx.chunk_rows = options, chunk_rows
        weight, bias = _cast(hidden_NC.dtype, weight_VC, bias_V)
        parts = [
            log_probs(F.linear(hidden_NC[rows], weight, bias), targets_N[rows], options)
            for rows in chunks(hidden_NC.shape[0], chunk_rows)
        ]
        return torch.cat(parts) if parts else hidden_NC.new_zeros(0, dtype=work_dtype(hidden_NC.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the logits again."""
        hidden_NC, weight_VC, bias_V, targets_N = ctx.saved_tensors
        weight, bias = _cast(hidden_NC.dtype, weight_VC, bias_V)
        gradients = Gradients(hidden_NC, weight_VC, bias_V, ctx.needs_input_grad[:3])
        for rows in chunks(hidden_NC.shape[0], ctx.chunk_rows):
            logits_nV = F.linear(hidden_NC[rows], weight, bias)
            replace_by_gradient(
                logits_nV, targets_N[rows], ctx.options, dbias_V=gradients.dbias_V, scales_n=-grads[0][rows]
            )
            gradients.add(rows, logits_nV, hidden_NC[rows], weight)
        inputs = (hidden_NC, weight_VC, bias_V)
        found = (gradients.dhidden_NC, gradients.dweight_VC, gradients.dbias_V)
        cast = (None if d is None or x is None else d.to(x.dtype) for d, x in zip(found, inputs, strict=True))
        return (*cast, None, None, None)


class CrossEntropy(torch.autograd.Function):
    """The loss of logits that exist; the backward computes the softmax again, in place of the logits where wished."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, options: LossOptions, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """(loss, log-probabilities)."""
        log_probs_N = torch.empty(len(logits_NV), dtype=work_dtype(logits_NV.dtype), device=logits_NV.device)
        loss = loss_of_logits(logits_NV, targets_N, options, log_probs_N)
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.options, ctx.inplace = options, inplace
        ctx.mark_non_differentiable(log_probs_N)
        return loss, log_probs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the logits."""
        logits_NV, targets_N = ctx.saved_tensors
        dlogits_NV = logits_NV if ctx.inplace else logits_NV.clone()
        replace_by_gradient(dlogits_NV, targets_N, ctx.options, scales_n=grads[0].expand(len(logits_NV)))
        return dlogits_NV, None, None, None


class LinearDistillation(torch.autograd.Function):
    """T^2 KL(teacher || student) summed over valid rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        teacher_logits_NV: Tensor | None,
        teacher_hidden_NE: Tensor | None,
        teacher_weight_VE: Tensor | None,
        teacher_bias_V: Tensor | None,
        valid_N: Tensor | None,
        temperature: float,
        softcap: float | None,
        teacher_softcap: float | None,
        chunk_rows: int,
    ) -> Tensor:
        """See the module's docstring."""
        weight, bias = _cast(hidden_NC.dtype, weight_VC, bias_V)
        wanted = ctx.needs_input_grad[:3]
        gradients = Gradients(hidden_NC, weight_VC, bias_V, wanted)
        total = torch.zeros((), dtype=work_dtype(hidden_NC.dtype), device=hidden_NC.device)
        for rows in chunks(hidden_NC.shape[0], chunk_rows):
            logits_nV = F.linear(hidden_NC[rows], weight, bias)
            if teacher_logits_NV is None:
                assert teacher_hidden_NE is not None
                assert teacher_weight_VE is not None
                teacher_nV = project(teacher_hidden_NE[rows], teacher_weight_VE, teacher_bias_V)
            else:
                teacher_nV = teacher_logits_NV[rows]
            s_nV = capped(logits_nV.to(total.dtype), softcap)
            student_nV = torch.log_softmax(s_nV / temperature, dim=-1)
            t_nV = torch.log_softmax(capped(teacher_nV.to(total.dtype), teacher_softcap) / temperature, dim=-1)
            losses_n = divergence(t_nV, student_nV)
            valid_n = None if valid_N is None else valid_N[rows]
            total += losses_n.sum() if valid_n is None else torch.where(valid_n, losses_n, 0).sum()
            if any(wanted):
                dlogits_nV = student_nV.exp_().sub_(t_nV.exp_()).mul_(temperature)
                if softcap is not None:
                    dlogits_nV.mul_(1 - (s_nV / softcap).square_())
                if valid_n is not None:
                    dlogits_nV.masked_fill_(~valid_n[:, None], 0)
                if gradients.dbias_V is not None:
                    gradients.dbias_V += dlogits_nV.sum(dim=0)
                gradients.add(rows, dlogits_nV.to(logits_nV.dtype), hidden_NC[rows], weight)
        ctx.save_for_backward(gradients.dhidden_NC, gradients.dweight_VC, gradients.dbias_V)
        ctx.dtypes = (hidden_NC.dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients."""
        return (*_scaled(ctx, grads[0]), *(None,) * 9)


def _cast(dtype: torch.dtype, weight_VC: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight_VC.to(dtype), None if bias_V is None else bias_V.to(dtype)


def _scaled(ctx: Any, dloss: Tensor) -> list[Tensor | None]:
    """The saved gradients times dloss, in their own dtypes."""
    return [
        None if gradient is None else (gradient * dloss).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]


class Gradients:
    """Sums of the gradients of a linear loss over chunks of rows; None where one is not wanted."""

    def __init__(
        self, hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> None:
        work = work_dtype(hidden_NC.dtype)
        self.dhidden_NC = torch.empty_like(hidden_NC) if wanted[0] else None
        self.dweight_VC = torch.zeros_like(weight_VC, dtype=work) if wanted[1] else None
        self.dbias_V = torch.zeros_like(bias_V, dtype=work) if bias_V is not None and wanted[2] else None

    def add(self, rows: slice, dlogits_nV: Tensor, hidden_nC: Tensor, weight: Tensor) -> None:
        """Take in a chunk, but for dbias."""
        if self.dhidden_NC is not None:
            torch.mm(dlogits_nV, weight, out=self.dhidden_NC[rows])
        if self.dweight_VC is not None:
            _accumulate_product(self.dweight_VC, dlogits_nV, hidden_nC)


def _accumulate_product(sum_VC: Tensor, a_nV: Tensor, b_nC: Tensor) -> None:
    """Add a^T b to a sum kept in fp32 (or fp64)."""
    if a_nV.dtype == sum_VC.dtype:
        sum_VC.addmm_(a_nV.T, b_nC)
    else:
        sum_VC.add_(a_nV.T @ b_nC)
