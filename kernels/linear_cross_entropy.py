"""The output layer and its cross-entropy in one operation, so that the logits are never whole in memory.

    logits = hidden weight^T + bias        loss = sum over valid rows of logsumexp(logits) - logits[target]

Rows are taken in chunks. When gradients are wanted they are computed chunk by chunk in the forward, while the logits
are there: dlogits = softmax(logits) - onehot(target), dhidden = dlogits weight, dweight += dlogits^T hidden; the
backward only scales them. At most `chunk_rows` rows of logits exist at a time, instead of N x V three times over.
The matrix products run in the dtype of hidden, the softmax in fp32; dweight is summed in fp32.

Shapes: N rows (tokens), C width, V vocabulary.
FLOPs: 6 N C V with gradients, 2 N C V without. Source: Wijmans et al. 2024 (arXiv 2411.09009) for the idea.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits at a time, in numbers: large enough for efficient products, and 16 MiB in bf16.
_CHUNK_NUMBERS = 8 * 2**20
# Rows of a softmax at a time on a CPU: its fp32 numbers should stay in the last-level cache between the passes.
_SOFTMAX_ROWS = 256


def default_chunk_rows(vocab_size: int) -> int:
    """Rows of logits that exist at a time where the caller does not say."""
    return max(1, _CHUNK_NUMBERS // vocab_size)


def cross_entropy_reference(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, *, bias_V: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The formula with whole logits, in fp32 (fp64 for fp64 inputs); a scalar."""
    work = _work(hidden_NC.dtype)
    weight = weight_VC.to(hidden_NC.dtype)
    logits_NV = F.linear(hidden_NC, weight, None if bias_V is None else bias_V.to(hidden_NC.dtype)).to(work)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum (not mean) of the cross-entropy over rows whose target is not `ignore_index`: a scalar in fp32 (or fp64).

    hidden in any float dtype; weight and bias are cast to it; targets int64 in [0, V) or `ignore_index`.
    `chunk_rows` bounds the rows of logits in memory (default: about 8 million numbers).
    """
    _check(hidden_NC, weight_VC, targets_N, chunk_rows)
    rows = chunk_rows or default_chunk_rows(weight_VC.shape[0])
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NC, weight_VC, bias, targets_N, ignore_index, rows
    )
    return loss


def token_log_probs(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:
    """Each row's log p(target): fp32 [N] (fp64 for fp64 inputs), 0 where the target is `ignore_index`; no gradient."""
    _check(hidden_NC, weight_VC, targets_N, chunk_rows)
    rows = chunk_rows or default_chunk_rows(weight_VC.shape[0])
    with torch.no_grad():
        weight = weight_VC.to(hidden_NC.dtype)
        bias = None if bias is None else bias.to(hidden_NC.dtype)
        parts = []
        for rows_slice in _chunks(hidden_NC.shape[0], rows):
            logits_nV = F.linear(hidden_NC[rows_slice], weight, bias)
            parts.append(_log_probs(logits_nV, targets_N[rows_slice], ignore_index))
        return torch.cat(parts) if parts else hidden_NC.new_zeros(0, dtype=_work(hidden_NC.dtype))


def _check(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, chunk_rows: int | None) -> None:
    if hidden_NC.dim() != 2 or targets_N.shape != hidden_NC.shape[:1] or weight_VC.shape[1] != hidden_NC.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_NC.shape)}, weight {tuple(weight_VC.shape)}, targets {tuple(targets_N.shape)} "
            "do not fit; expected [N, C], [V, C], [N]"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1")


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def _softmax_chunks(logits_nV: Tensor) -> Iterator[slice]:
    return _chunks(len(logits_nV), _SOFTMAX_ROWS if logits_nV.device.type == "cpu" else max(1, len(logits_nV)))


def _log_probs(logits_nV: Tensor, targets_n: Tensor, ignore_index: int) -> Tensor:
    """Log-probability of each target, 0 where ignored: fp32 (or fp64) [n]."""
    parts = []
    for rows in _softmax_chunks(logits_nV):
        log_probs_rV = torch.log_softmax(logits_nV[rows].to(_work(logits_nV.dtype)), dim=-1)
        valid_r = targets_n[rows] != ignore_index
        found_r = log_probs_rV.gather(1, torch.where(valid_r, targets_n[rows], 0)[:, None])[:, 0]
        parts.append(torch.where(valid_r, found_r, 0))
    return torch.cat(parts)


def _replace_by_gradient(logits_nV: Tensor, targets_n: Tensor, ignore_index: int, dbias_V: Tensor | None) -> Tensor:
    """Overwrite logits with softmax - onehot (0 in ignored rows), add its column sums to dbias; returns the loss."""
    total = torch.zeros((), dtype=_work(logits_nV.dtype), device=logits_nV.device)
    for rows in _softmax_chunks(logits_nV):
        targets_r = targets_n[rows]
        valid_r1 = (targets_r != ignore_index)[:, None]
        safe_r1 = torch.where(valid_r1, targets_r[:, None], 0)
        log_probs_rV = torch.log_softmax(logits_nV[rows].to(_work(logits_nV.dtype)), dim=-1)
        total -= torch.where(valid_r1, log_probs_rV.gather(1, safe_r1), 0).sum()
        dlogits_rV = log_probs_rV.exp_()
        dlogits_rV.scatter_add_(1, safe_r1, torch.full_like(safe_r1, -1, dtype=dlogits_rV.dtype))
        if not bool(valid_r1.all()):
            dlogits_rV.masked_fill_(~valid_r1, 0)
        if dbias_V is not None:
            dbias_V += dlogits_rV.sum(dim=0)
        logits_nV[rows] = dlogits_rV
    return total


def _work(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        ignore_index: int,
        chunk_rows: int,
    ) -> Tensor:
        dtype = hidden_NC.dtype
        work = _work(dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight = weight_VC.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        dhidden_NC = torch.empty_like(hidden_NC) if wants_hidden else None
        dweight_VC = torch.zeros_like(weight_VC, dtype=work) if wants_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=work) if bias_V is not None and wants_bias else None
        total = torch.zeros((), dtype=work, device=hidden_NC.device)
        for rows in _chunks(hidden_NC.shape[0], chunk_rows):
            hidden_nC, targets_n = hidden_NC[rows], targets_N[rows]
            logits_nV = F.linear(hidden_nC, weight, bias)
            if dhidden_NC is None and dweight_VC is None and dbias_V is None:
                total -= _log_probs(logits_nV, targets_n, ignore_index).sum()
                continue
            total += _replace_by_gradient(logits_nV, targets_n, ignore_index, dbias_V)
            dlogits_nV = logits_nV
            if dhidden_NC is not None:
                torch.mm(dlogits_nV, weight, out=dhidden_NC[rows])
            if dweight_VC is not None:
                _accumulate_product(dweight_VC, dlogits_nV, hidden_nC)
        ctx.save_for_backward(dhidden_NC, dweight_VC, dbias_V)
        ctx.dtypes = (dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        scaled = [
            None if gradient is None else (gradient * grads[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], scaled[2], None, None, None


def _accumulate_product(sum_VC: Tensor, a_nV: Tensor, b_nC: Tensor) -> None:
    """Add a^T b to a sum kept in fp32 (or fp64)."""
    if a_nV.dtype == sum_VC.dtype:
        sum_VC.addmm_(a_nV.T, b_nC)
    else:
        sum_VC.add_(a_nV.T @ b_nC)
