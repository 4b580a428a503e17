"""One update of AdamW: its formula in plain torch, and everything it works on as one object."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Formula:
    """The numbers of one update; `rest` is 1 - beta, `step` lr / (1 - beta1^t), `root` 1 / sqrt(1 - beta2^t)."""

    lr: float
    step: float
    root: float
    beta1: float
    beta2: float
    rest1: float
    rest2: float
    eps: float


def formula_of(lr: float, betas: tuple[float, float], eps: float, update: int) -> Formula:
    """The numbers of update `update`, counted from 1."""
    beta1, beta2 = betas
    step, root = lr / (1 - beta1**update), 1 / math.sqrt(1 - beta2**update)
    return Formula(lr, step, root, beta1, beta2, 1 - beta1, 1 - beta2, eps)


def adamw_reference(
    w: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    update: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in the dtype of its inputs (fp32 or fp64): new w, m and v."""
    formula = formula_of(lr, betas, eps, update)
    w = w - w * (lr * weight_decay)
    m = m * formula.beta1 + gradient * formula.rest1
    v = v * formula.beta2 + gradient * gradient * formula.rest2
    return w - m * formula.step / (v.sqrt() * formula.root + eps), m, v


@dataclass(frozen=True)
class Step:
    """One update of T parameters, checked: lists of T tensors (no scales with fp32 moments) and what applies to all."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    first_moments: list[Tensor]
    second_moments: list[Tensor]
    first_scales: list[Tensor]
    second_scales: list[Tensor]
    weight_decays: list[float]
    grad_scale: Tensor | None
    lr: float
    betas: tuple[float, float]
    eps: float
    update: int
    seed: int
    stochastic_rounding: bool

    @property
    def eight_bit(self) -> bool:
        """Whether the moments are codes with scales."""
        return bool(self.first_scales)

    @property
    def states(self) -> list[list[Tensor]]:
        """Both lists of moments, then those of their scales where there are any."""
        lists = [self.first_moments, self.second_moments]
        return [*lists, self.first_scales, self.second_scales] if self.eight_bit else lists

    def groups(self) -> list[list[int]]:
        """Indices of the parameters, by the dtypes of parameter and gradient."""
        by_dtypes: dict[tuple[torch.dtype, torch.dtype], list[int]] = defaultdict(list)
        for place, (parameter, gradient) in enumerate(zip(self.parameters, self.gradients, strict=True)):
            by_dtypes[parameter.dtype, gradient.dtype].append(place)
        return list(by_dtypes.values())
