"""Pruning: the weights that matter least become 0.

    magnitude   score |w|                    the least of a whole weight
    wanda       score |w_nk| |x_k|           the least of each row; |x_k| the norm of input k over all tokens

By share (0.5: half of the weights), or n:m: of every m neighbouring inputs of a row the n with the highest scores stay
(2:4 is what sparse tensor cores multiply). What stays keeps its value. The result is stored dense, since no serving
program in use reads sparse files any more.

Source: Sun et al., Wanda, arXiv:2306.11695; n:m as in Mishra et al., arXiv:2104.08378.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.quantize.statistics import InputStatistics

METHODS = ("magnitude", "wanda")


@dataclass(frozen=True)
class Sparsity:
    """`share` of the weights that become 0; with `kept` and `block`, `kept` of every `block` inputs stay."""

    share: float
    kept: int = 0
    block: int = 0

    def describe(self) -> str:
        return f"{self.kept}:{self.block}" if self.block else f"{self.share:.3g} of the weights 0"

    def check_shape(self, path: str, width: int) -> None:
        """Raises `UsageError` where blocks do not fill a row of so many inputs."""
        if self.block and width % self.block:
            raise UsageError(
                f"{path} has {width} inputs, which blocks of {self.block} do not fill; give a share, such as 0.5"
            )


def parse_sparsity(text: str) -> Sparsity:
    """`0.5` or `2:4`. Raises `UsageError` for anything else."""
    pattern = re.fullmatch(r"(\d+):(\d+)", text)
    if pattern:
        kept, block = int(pattern[1]), int(pattern[2])
        if 0 < kept < block:
            return Sparsity(1 - kept / block, kept, block)
    elif re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
        return Sparsity(float(text))
    raise UsageError(
        f"--sparsity is {text!r}; give the share of weights that become 0, such as 0.5, or how many of how many "
        "neighbours stay, such as 2:4"
    )


def prune(w_NK: Tensor, sparsity: Sparsity, statistics: InputStatistics | None = None) -> Tensor:
    """w [N, K] in its dtype with the least weights 0: by magnitude, or with statistics of the inputs by Wanda's score.

    Exactly the wanted number becomes 0, rounded to whole weights (of a row with Wanda); weights that were 0 count.
    """
    score_NK = w_NK.abs().to(torch.promote_types(w_NK.dtype, torch.float32))
    if statistics is not None:
        score_NK = score_NK * statistics.hessian_KK.diagonal().clamp(min=0).sqrt().to(score_NK.dtype)
    if sparsity.block:
        groups = score_NK.reshape(-1, sparsity.block)
    else:
        groups = score_NK.reshape(1, -1) if statistics is None else score_NK
    count = sparsity.block - sparsity.kept if sparsity.block else round(sparsity.share * groups.shape[1])
    least = groups.topk(count, dim=1, largest=False).indices
    gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, least, True).view(w_NK.shape)
    return w_NK.masked_fill(gone, 0)
