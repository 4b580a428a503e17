"""What a method is told about the inputs of a layer: sums over all calibration tokens, and some of their rows.

Layers that share their input share its statistics: q, k and v; gate and up; o; down. With X [tokens, K] the inputs of
all tokens:

    hessian_KK = 2 / tokens X^T X        absmean_K = mean |X|        absmax_K = max |X|        sample_XK: rows of X

`update` adds a piece of X; how X is cut into pieces changes the results only by rounding. Rows of the sample are spread
evenly over the tokens seen so far: those whose number is a multiple of a stride, which doubles whenever they become too
many. So the choice needs no random numbers and is the same for every way of cutting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Rows that are kept of the inputs, at most.
SAMPLE_ROWS = 512


@dataclass(slots=True)
class InputStatistics:
    """Made by `InputStatistics.empty`; sums and the sample are fp32 (float64 where that was asked for)."""

    tokens: int
    hessian_KK: Tensor
    absmean_K: Tensor
    absmax_K: Tensor
    sample_XK: Tensor
    _stride: int = field(default=1, repr=False)

    @classmethod
    def empty(cls, width: int, *, dtype: torch.dtype = torch.float32) -> InputStatistics:
        """Of K = `width` inputs, no token seen yet."""
        zeros = torch.zeros(width, dtype=dtype)
        return cls(0, torch.zeros(width, width, dtype=dtype), zeros, zeros.clone(), torch.empty(0, width, dtype=dtype))

    @classmethod
    def of(cls, x: Tensor) -> InputStatistics:
        """Of inputs [..., K], in fp32 (float64 in float64)."""
        found = cls.empty(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
        found.update(x)
        return found

    def update(self, x: Tensor) -> None:
        """Add inputs [..., K] of more tokens, in any float dtype."""
        x_XK = x.detach().flatten(0, -2).to(self.hessian_KK.dtype)
        if not len(x_XK):
            return
        before, self.tokens = self.tokens, self.tokens + len(x_XK)
        kept = before / self.tokens
        self.hessian_KK.mul_(kept).addmm_(x_XK.t(), x_XK, alpha=2 / self.tokens)
        size_XK = x_XK.abs()
        self.absmean_K.mul_(kept).add_(size_XK.sum(0), alpha=1 / self.tokens)
        self.absmax_K = torch.maximum(self.absmax_K, size_XK.amax(0))
        first = -before % self._stride
        self.sample_XK = torch.cat((self.sample_XK, x_XK[first :: self._stride]))
        while len(self.sample_XK) > SAMPLE_ROWS:
            self.sample_XK = self.sample_XK[::2]
            self._stride *= 2
        self.sample_XK = self.sample_XK.clone()  # no view of what was dropped
