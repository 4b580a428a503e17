"""AdamW over a fixed list of parameters, with their moments: what `op.adamw` does, update after update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trine.kernels.adamw.checks import STATE_DTYPES, check_gradients, check_options, check_parameters
from trine.kernels.adamw.op import apply
from trine.kernels.adamw.states import empty_states


class AdamW:
    """The moments of a list of parameters, and their updates.

    `parameters` are contiguous, fp32 or bf16, on one device. `weight_decay` is one number, or one for each parameter.
    `state_dtype` int8 keeps the moments in 8 bits. `stochastic_rounding` is about bf16 parameters; without it they are
    rounded to nearest. `seed` decides all random bits.

    Raises ValueError for parameters, options or gradients that are not so.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float | Sequence[float],
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        self.parameters = list(parameters)
        self.betas = betas
        self.eps = eps
        if isinstance(weight_decay, int | float):
            weight_decay = [weight_decay] * len(self.parameters)
        self.weight_decays = [float(decay) for decay in weight_decay]
        self.eight_bit = state_dtype == torch.int8
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype is {state_dtype}; supported are float32 and int8")
        check_options(betas, seed)
        check_parameters(self.parameters, self.weight_decays)
        self.first_scales: list[Tensor] = []
        self.second_scales: list[Tensor] = []
        if self.eight_bit:
            states = [empty_states(parameter.numel(), parameter.device) for parameter in self.parameters]
            self.first_moments, self.second_moments, self.first_scales, self.second_scales = (
                [state[place] for state in states] for place in range(4)
            )
        else:
            self.first_moments = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
            self.second_moments = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    @torch.no_grad()
    def step(
        self,
        lr: float,
        *,
        update: int,
        gradients: Sequence[Tensor] | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Update number `update` (from 1) of every parameter at learning rate `lr`.

        `gradients` (default: each parameter's `.grad`) are fp32 or bf16, in the parameters' shapes. `grad_scale` (one
        fp32 number on their device) multiplies them, such as the factor that clips them: it is read where it lies,
        without waiting for the device. Gradients are not changed.
        """
        if not self.parameters:
            return
        given = [parameter.grad for parameter in self.parameters] if gradients is None else gradients
        apply(
            self.parameters,
            check_gradients(self.parameters, given, grad_scale, update),
            self.first_moments,
            self.second_moments,
            self.first_scales,
            self.second_scales,
            self.weight_decays,
            grad_scale,
            lr,
            self.betas,
            self.eps,
            update,
            self.seed,
            self.stochastic_rounding,
        )
