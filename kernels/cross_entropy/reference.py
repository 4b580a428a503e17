"""The losses of this folder as plain PyTorch, with whole logits: what the other implementations are tested against.

    s = logits, or softcap tanh(logits / softcap)      lse = logsumexp(s)      q = (1 - e) onehot(target) + e / V
    cross-entropy = sum over valid rows of lse - sum_v q_v s_v + z_loss lse^2          (e: label smoothing)
    distillation = sum over valid rows of T^2 KL(softmax(teacher / T) || softmax(student / T))

Softmax and sums in fp32 (fp64 for fp64 inputs); products in the dtype of hidden.
Sources: Szegedy et al. 2016 (arXiv 1512.00567) for label smoothing; Chowdhery et al. 2022 (arXiv 2204.02311) for the
z-loss; Gemma 2 (arXiv 2408.00118) for the softcap; Hinton et al. 2015 (arXiv 1503.02531) for distillation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cross_entropy.options import work_dtype


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits where there is no cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def project(hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits in the dtype of hidden, to which weight and bias are cast."""
    dtype = hidden_NC.dtype
    return F.linear(hidden_NC, weight_VC.to(dtype), None if bias_V is None else bias_V.to(dtype))


def cross_entropy_reference(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum over valid rows: a scalar in fp32 (fp64)."""
    s_NV = capped(logits_NV.to(work_dtype(logits_NV.dtype)), softcap)
    loss = F.cross_entropy(s_NV, targets_N, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        lse_N = torch.logsumexp(s_NV, dim=-1)
        loss = loss + z_loss * torch.where(targets_N != ignore_index, lse_N.square(), 0).sum()
    return loss


def linear_cross_entropy_reference(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The same of logits = hidden weight^T + bias."""
    return cross_entropy_reference(
        project(hidden_NC, weight_VC, bias),
        targets_N,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


def token_log_probs_reference(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """log p(target) of each row, 0 where ignored: fp32 (fp64) [N]."""
    logits_NV = project(hidden_NC, weight_VC, bias)
    s_NV = capped(logits_NV.to(work_dtype(logits_NV.dtype)), softcap)
    valid_N = targets_N != ignore_index
    found_N = torch.log_softmax(s_NV, dim=-1).gather(1, torch.where(valid_N, targets_N, 0)[:, None])[:, 0]
    return torch.where(valid_N, found_N, 0)


def divergence(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher || student) of each row, from log-probabilities: [N]. What the teacher never says counts nothing."""
    never_NV = teacher_NV == float("-inf")
    return (teacher_NV.exp() * torch.where(never_NV, 0, teacher_NV - student_NV)).sum(dim=-1)


def distillation_reference(
    logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    temperature: float = 1.0,
    valid_N: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """The sum over valid rows, for logits of both models: a scalar in fp32 (fp64)."""
    work = work_dtype(logits_NV.dtype)
    student_NV = torch.log_softmax(capped(logits_NV.to(work), softcap) / temperature, dim=-1)
    teacher_NV = torch.log_softmax(capped(teacher_logits_NV.to(work), teacher_softcap) / temperature, dim=-1)
    rows_N = divergence(teacher_NV, student_NV)
    if valid_N is not None:
        rows_N = torch.where(valid_N, rows_N, 0)
    return temperature**2 * rows_N.sum()
