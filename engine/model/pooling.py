"""From the hidden states of tokens to one vector for every sequence, whether rows are padded or packed.

Sequences are spans of the tokens laid end to end, row after row: `Spans`. So padding on either side, several documents
in a row and one long row of all sequences are pooled alike.

    cls, last      the first, the last token
    mean           sum / n                        mean_sqrt   sum / sqrt(n)
    max            the largest of each channel    weighted_mean   sum of i x_i / sum of i, i = 1 ... n

Sums run in fp32 at least, as in sentence-transformers.

Shapes: B rows, T tokens, C width, N sequences, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.model.head_config import Pooling
from trine.kernels.multi_tensor import upload


@dataclass(frozen=True, slots=True)
class Spans:
    """Where each sequence lies among B * T tokens: from `start_N` (int64), `length_N` tokens.

    `longest`: of `length_N`, where the host knows it; otherwise pooling may have to wait for the device.
    """

    start_N: Tensor
    length_N: Tensor
    longest: int | None = None

    def __len__(self) -> int:
        return len(self.start_N)


def row_spans(mask_BT: Tensor) -> Spans:
    """The sequence of each row, N = B; `mask_BT` is True or 1 at its tokens, which lie side by side.

    Raises ValueError for a row without tokens.
    """
    T = mask_BT.shape[1]
    length_N = mask_BT.to(torch.int64).sum(dim=1)
    if T == 0 or (mask_BT.device.type == "cpu" and bool((length_N == 0).any())):
        raise ValueError("a row of the batch has no token; leave it out")
    rows = torch.arange(mask_BT.shape[0], device=mask_BT.device)
    return Spans(rows * T + mask_BT.to(torch.int8).argmax(dim=1), length_N)


def document_spans(segment_ids_BT: Tensor, *, padding: int | None = None) -> Spans:
    """The documents of packed rows in the order in which they lie: every run of one id, but for those of `padding`."""
    begins_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    start_N = begins_BT.flatten().nonzero()[:, 0]
    end_N = torch.cat((start_N[1:], start_N.new_tensor([segment_ids_BT.numel()])))
    kept_N = torch.ones_like(start_N, dtype=torch.bool)
    if padding is not None:
        kept_N = segment_ids_BT.flatten()[start_N] != padding
    return Spans(start_N[kept_N], (end_N - start_N)[kept_N])


def packed_spans(lengths: Sequence[int], *, device: torch.device | None = None) -> Spans:
    """Sequences of these lengths end to end in one row; on the CPU where no device is given."""
    length_N = upload(lengths, torch.int64, device or torch.device("cpu"))
    return Spans(length_N.cumsum(0) - length_N, length_N, max(lengths, default=0))


def pool(hidden_BTC: Tensor, spans: Spans, modes: Sequence[Pooling]) -> Tensor:
    """One vector for every sequence, [N, len(modes) * C] in the dtype of `hidden_BTC`."""
    tokens_MC = hidden_BTC.flatten(0, -2)
    if tuple(modes) == ("cls",):  # the common case needs no copy of all tokens
        return tokens_MC[spans.start_N]
    longest = spans.longest
    if longest is None:
        longest = int(spans.length_N.max()) if len(spans) else 0
    steps_L = torch.arange(longest, device=tokens_MC.device)
    mask_NL = steps_L < spans.length_N[:, None]
    places_NL = torch.where(mask_NL, spans.start_N[:, None] + steps_L, spans.start_N[:, None])
    hidden_NLC = tokens_MC[places_NL]
    return torch.cat([_pooled(mode, hidden_NLC, mask_NL, spans.length_N) for mode in modes], dim=-1)


def _pooled(mode: Pooling, hidden_NLC: Tensor, mask_NL: Tensor, length_N: Tensor) -> Tensor:
    if mode == "cls":
        return hidden_NLC[:, 0]
    if mode == "last":
        return hidden_NLC[torch.arange(len(length_N), device=length_N.device), length_N - 1]
    if mode == "max":
        return hidden_NLC.masked_fill(~mask_NL[..., None], -torch.inf).amax(dim=1)
    weight_NL = mask_NL.to(torch.promote_types(hidden_NLC.dtype, torch.float32))
    if mode == "weighted_mean":
        weight_NL = weight_NL * torch.arange(1, mask_NL.shape[1] + 1, device=mask_NL.device)
    sum_NC = (hidden_NLC.to(weight_NL.dtype) * weight_NL[..., None]).sum(dim=1)
    total_N1 = weight_NL.sum(dim=1, keepdim=True)
    return (sum_NC / (total_N1.sqrt() if mode == "mean_sqrt" else total_N1)).to(hidden_NLC.dtype)
