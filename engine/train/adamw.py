"""AdamW over the named parameters of a model, by `trine.kernels.adamw`: formula and formats stand there.

`torch.optim.AdamW` would import torch's compiler: 1.2 s and 900 modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trine.engine.train.recipe import OptimSettings
from trine.kernels.adamw import optimizer


class AdamW:
    """AdamW with decoupled weight decay on `decay` and none on `no_decay`, parameters by name, gradients in `.grad`.

    Moments are fp32, or 8-bit with `optim.state_dtype = "int8"`, whose random bits come from `seed`.
    """

    def __init__(
        self, decay: Mapping[str, Tensor], no_decay: Mapping[str, Tensor], settings: OptimSettings, *, seed: int
    ) -> None:
        self._names = [*decay, *no_decay]
        self._adamw = optimizer.AdamW(
            [*decay.values(), *no_decay.values()],
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=[settings.weight_decay] * len(decay) + [0.0] * len(no_decay),
            state_dtype=torch.int8 if settings.state_dtype == "int8" else torch.float32,
            seed=seed,
        )

    def step(self, lr: float, *, update: int) -> None:
        """Update number `update` (from 1) of every parameter at learning rate `lr`."""
        self._adamw.step(lr, update=update)

    def state_tensors(self) -> dict[str, Tensor]:
        """Both moments of each parameter, and with 8-bit states their scales, by kind and name (not copies)."""
        kinds = {"exp_avg": self._adamw.first_moments, "exp_avg_sq": self._adamw.second_moments}
        if self._adamw.eight_bit:
            kinds |= {"exp_avg_scale": self._adamw.first_scales, "exp_avg_sq_scale": self._adamw.second_scales}
        return {
            f"adamw.{kind}.{name}": tensor
            for kind, tensors in kinds.items()
            for name, tensor in zip(self._names, tensors, strict=True)
        }
