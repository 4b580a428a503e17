"""Causal attention whose bits for a query depend on that query's own keys alone: in training as in decoding.

    o = softmax(scale q k^T) v      over the keys of the query's own sequence, up to its own position

A token gets the same bits in a training step, in a prompt taken whole or in chunks, and decoded alone or in a batch,
because one routine with one order over the keys computes all of them:

- On a GPU it is the kernel of paged attention with splits of `SPLIT` keys. Training calls it with the keys as they lie,
  as a pool of blocks of one slot (`Sequences.table_RM`); serving calls `paged_attention(..., split_size=SPLIT)`.
- On a CPU it is the loops of `cpu/invariant_loops.py`, which `paged_attention` takes for any `split_size`.

The backward is that of `attention`, computed from q, k and v anew: it costs one more forward, and its bits repeat.

Shapes: B rows of T tokens, H query heads, K key/value heads (H a multiple of K), D head dimension, R sequences, N = B T
tokens in all. Cost: that of `paged_attention` forward, of `attention` forward and backward in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.kernels.attention.mask import Mask, make_mask
from trine.kernels.attention.op import attention
from trine.kernels.cpu.invariant import attend_invariant, check_invariant
from trine.kernels.operation import run
from trine.kernels.paged_attention.launcher import paged_attention_forward
from trine.kernels.paged_attention.op import check_options
from trine.kernels.target import uses_triton

# Keys of a split: the order of the sums, and so the bits of this mode on a GPU, follow from it.
SPLIT = 512


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences that lie end to end in B rows of T tokens: whole rows, or the documents of each.

    `starts` int32 [R + 1], the first token of each and the end of the last; `lengths_R` int32; `table_RM` int32, the
    tokens of each (on a GPU; M is `max_length`); `mask`, the same for `attention`. Made by `make_sequences`.
    """

    starts: Tensor
    lengths_R: Tensor
    table_RM: Tensor | None
    max_length: int
    window: int | None
    mask: Mask
    shape: tuple[int, int]


def make_sequences(
    B: int, T: int, *, device: torch.device, segment_ids_BT: Tensor | None = None, window: int | None = None
) -> Sequences:
    """What one forward pass shares. `window`: keys before its own that a token sees; None for all.

    With `segment_ids_BT` ([B, T]) every run of one id is a sequence; on a GPU their number is waited for. Raises
    ValueError for ids of another shape and a negative window.
    """
    if segment_ids_BT is not None and tuple(segment_ids_BT.shape) != (B, T):
        raise ValueError(f"segment_ids_BT has shape {tuple(segment_ids_BT.shape)}; expected {(B, T)}")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; give the number of keys before a token's own, or None")
    if segment_ids_BT is None:
        starts = torch.arange(B + 1, device=device, dtype=torch.int32) * T
        lengths_R, max_length = starts.diff(), T
    else:
        begins_BT = torch.ones(B, T, dtype=torch.bool, device=device)
        begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        end = torch.tensor([B * T], device=device)
        starts = torch.cat((begins_BT.flatten().nonzero()[:, 0], end)).to(torch.int32)
        lengths_R = starts.diff()
        max_length = int(lengths_R.max()) if len(lengths_R) else 0
    table_RM = None
    if uses_triton(starts):
        table_RM = starts[:-1, None] + torch.arange(max_length, device=device, dtype=torch.int32)
    mask = make_mask(
        causal=True,
        num_keys=T,
        segment_ids_BT=segment_ids_BT,
        window=(window, None if window is None else 0),
        device=device,
    )
    return Sequences(starts, lengths_R, table_RM, max_length, window, mask, (B, T))


def invariant_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    *,
    sequences: Sequences,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """o_BHTD (laid out as [B, T, H, D]) in the dtype of q, with gradients for q, k, v and sinks.

    The bits of a token are those that `paged_attention(..., split_size=SPLIT)` gives it over a pool of the same dtype,
    on the same device. `scale` defaults to D**-0.5. Raises ValueError, by name, for what does not fit; on a CPU also
    where the loops cannot be used: see `cpu/invariant.check_invariant`.
    """
    _check(q_BHTD, k_BKTD, v_BKTD, sequences)
    T = q_BHTD.shape[2]
    check_options(q_BHTD[:0].transpose(1, 2).flatten(0, 1), T, T, sequences.window, softcap, sinks_H, None)
    scale = q_BHTD.shape[3] ** -0.5 if scale is None else scale
    if not uses_triton(q_BHTD):
        check_invariant(q_BHTD.dtype, k_BKTD.dtype)
    o_BHTD: Tensor = _Attention.apply(q_BHTD, k_BKTD, v_BKTD, sinks_H, sequences, scale, softcap)  # type: ignore[no-untyped-call]
    return o_BHTD


def _check(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> None:
    if any(x.dim() != 4 for x in (q, k, v)) or k.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have shapes {shapes}; expected [B, H, T, D] and twice [B, K, T, D]")
    B, H, T, D = q.shape
    K = k.shape[1]
    if k.shape != (B, K, T, D) or K == 0 or H % K:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit; expected [B, H, T, D] and [B, K, T, D]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating-point dtype")
    if sequences.shape != (B, T):
        raise ValueError(
            f"sequences were made for {sequences.shape[0]} rows of {sequences.shape[1]} tokens, not {B} of {T}"
        )


def _rows(x_BHTD: Tensor) -> Tensor:
    """[N, H, D], a view where tokens lie before heads in memory."""
    x_NHD = x_BHTD.transpose(1, 2).flatten(0, 1)
    return x_NHD if x_NHD.stride(-1) == 1 else x_NHD.contiguous()


def _forward(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    sinks_H: Tensor | None,
    sequences: Sequences,
    scale: float,
    softcap: float | None,
) -> Tensor:
    q_NHD, k_NKD, v_NKD = (_rows(x) for x in (q_BHTD, k_BKTD, v_BKTD))
    if sequences.table_RM is not None:
        o_NHD: Tensor = run(paged_attention_forward,
            q_NHD, k_NKD[:, None], v_NKD[:, None], sequences.table_RM, sequences.lengths_R, sequences.starts, sinks_H,
            None, None, sequences.max_length, sequences.max_length, scale, sequences.window, softcap or 0.0, SPLIT,
        )  # fmt: skip
    else:
        starts = sequences.starts.tolist()
        o_NHD = attend_invariant(
            q_NHD,
            k_NKD[None],
            v_NKD[None],
            block_table_RM=torch.zeros(len(starts) - 1, 1, dtype=torch.int32),
            lengths_R=sequences.lengths_R,
            starts=starts,
            first_slots=starts[:-1],
            scale=scale,
            window=sequences.window,
            softcap=softcap,
            sinks_H=sinks_H,
        )
    o_BTHD: Tensor = o_NHD.unflatten(0, sequences.shape)  # type: ignore[no-untyped-call]
    return o_BTHD.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        sinks_H: Tensor | None,
        sequences: Sequences,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, sinks_H)
        ctx.arguments = sequences, scale, softcap
        return _forward(q_BHTD, k_BKTD, v_BKTD, sinks_H, sequences, scale, softcap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sequences, scale, softcap = ctx.arguments
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        q_BHTD, k_BKTD, v_BKTD, sinks_H = leaves
        with torch.enable_grad():
            o_BHTD = attention(
                q_BHTD, k_BKTD, v_BKTD, mask=sequences.mask, scale=scale, softcap=softcap, sinks_H=sinks_H
            )
            found = iter(torch.autograd.grad(o_BHTD, [x for x in leaves if x is not None], grads[0]))
        return *(None if x is None else next(found) for x in leaves), None, None, None
