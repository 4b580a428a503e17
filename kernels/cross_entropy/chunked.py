"""The linear losses on a GPU: logits a chunk of rows at a time, their gradients made on the way.

For each chunk torch multiplies (cuBLAS), one kernel replaces the logits by their gradient, and torch multiplies twice
more. dweight is summed in fp32 by the products themselves where the library can: each reads and writes the sum once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels.cross_entropy.options import LossOptions, chunks
from trine.kernels.cross_entropy.projection import launch_merge, launch_parts
from trine.kernels.cross_entropy.rows import launch_rows
from trine.kernels.launch import ceil_div, result_dtype


@dataclass(frozen=True)
class Head:
    """An output layer: hidden [N, C], weight [V, C] and bias [V], contiguous and in the dtype of hidden."""

    hidden_NC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None

    @staticmethod
    def of(hidden_NC: Tensor, weight_VC: Tensor, bias: Tensor | None) -> Head:
        """Casts and copies where it must."""
        dtype = hidden_NC.dtype
        cast = None if bias is None else bias.to(dtype).contiguous()
        return Head(hidden_NC.contiguous(), weight_VC.to(dtype).contiguous(), cast)

    def buffer(self, chunk_rows: int) -> Tensor:
        """Memory for a chunk of logits. Rows begin at multiples of 128 bytes, whatever V: products are fast so."""
        rows, vocab_size = min(chunk_rows, len(self.hidden_NC)), len(self.weight_VC)
        step = 128 // self.hidden_NC.element_size()
        return self.hidden_NC.new_empty(rows, ceil_div(vocab_size, step) * step)[:, :vocab_size]

    def logits(self, rows: slice, buffer: Tensor) -> Tensor:
        """The logits of some rows, in the buffer."""
        hidden_nC = self.hidden_NC[rows]
        logits_nV = buffer[: len(hidden_nC)]
        if self.bias_V is None:
            return torch.mm(hidden_nC, self.weight_VC.t(), out=logits_nV)
        return torch.addmm(self.bias_V, hidden_nC, self.weight_VC.t(), out=logits_nV)


# Replaces a chunk of logits (rows, logits) by their gradient.
Replace = Callable[[slice, Tensor], None]


def run_chunks(head: Head, chunk_rows: int, needed: Sequence[bool], replace: Replace) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias in fp32, empty where not needed."""
    hidden_NC, weight_VC = head.hidden_NC, head.weight_VC
    shapes = (hidden_NC.shape, weight_VC.shape, weight_VC.shape[:1])
    # dweight and dbias are written by the first chunk; with no chunk at all they stay 0.
    make = hidden_NC.new_empty if len(hidden_NC) else hidden_NC.new_zeros
    dhidden_NC, dweight_VC, dbias_V = (
        make(shape if need else (0,), dtype=torch.float32) for shape, need in zip(shapes, needed, strict=True)
    )
    buffer = head.buffer(chunk_rows)
    for rows in chunks(len(hidden_NC), chunk_rows):
        logits_nV = head.logits(rows, buffer)
        replace(rows, logits_nV)
        if needed[0]:
            _multiply(logits_nV, weight_VC, dhidden_NC[rows], add=False)
        if needed[1]:
            _multiply(logits_nV.t(), hidden_NC[rows], dweight_VC, add=rows.start > 0)
        if needed[2]:
            sums_V = logits_nV.sum(dim=0, dtype=torch.float32)
            dbias_V = dbias_V.add_(sums_V) if rows.start else sums_V
    return dhidden_NC, dweight_VC, dbias_V


def in_place(logits_nV: Tensor, kernel: Callable[[Tensor], None]) -> None:
    """Let a kernel overwrite logits: in bf16 in the interpreter by way of fp32, see `launch.result_dtype`."""
    stored = logits_nV.to(result_dtype(logits_nV.dtype))
    kernel(stored)
    if stored is not logits_nV:
        logits_nV.copy_(stored)


def evaluate(head: Head, targets_N: Tensor, options: LossOptions, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """Losses and log-probabilities of the rows, without gradients; `op.py` says why by which kernel."""
    if head.hidden_NC.dtype != torch.float32:
        parts = launch_parts(head.hidden_NC, head.weight_VC, head.bias_V, targets_N, options)
        return launch_merge(parts, targets_N, len(head.weight_VC), options)
    losses_N, log_probs_N = (head.hidden_NC.new_empty(len(targets_N), dtype=torch.float32) for _ in range(2))
    buffer = head.buffer(chunk_rows)
    for rows in chunks(len(targets_N), chunk_rows):
        results = {"losses_N": losses_N[rows], "log_probs_N": log_probs_N[rows]}
        launch_rows(head.logits(rows, buffer), targets_N[rows], options, **results)
    return losses_N, log_probs_N


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """a b into fp32 `out`, or added to it: straight from the fp32 accumulator where the library can."""
    if a.is_cuda and torch.version.hip is None and a.dtype != torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif a.is_cuda and a.dtype != torch.float32:
        product = a @ b
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


@torch.library.custom_op("trine::scale_loss_gradients", mutates_args=())
def scale_loss_gradients(
    dloss: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered backward of the linear losses: each gradient times dloss (a scalar), in its own dtype."""
    return (
        _scaled(dhidden, dloss, hidden_dtype),
        _scaled(dweight, dloss, weight_dtype),
        _scaled(dbias, dloss, bias_dtype),
    )


def _scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass, rounded once."""
    return torch.mul(gradient.float(), dloss.float(), out=torch.empty_like(gradient, dtype=dtype))


@scale_loss_gradients.register_fake
def _(
    dloss: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dhidden, dtype=hidden_dtype),
        torch.empty_like(dweight, dtype=weight_dtype),
        torch.empty_like(dbias, dtype=bias_dtype),
    )
