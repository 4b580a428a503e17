"""AdamW over many parameters in one pass, with decoupled weight decay.

With gradient G (times `grad_scale`), moments m and v, update number t and rates b1, b2:

    w <- (1 - lr decay) w;    m <- b1 m + (1 - b1) G;    v <- b2 v + (1 - b2) G^2
    w <- w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

All of it in fp32, in one Triton launch for all parameters of one pair of dtypes (parameter and gradient), whatever
their number and shapes. Parameters are fp32, or bf16 with stochastic rounding (`rounding.py`), which keeps the small
updates that rounding to nearest loses; moments are fp32, or 8 bits in blocks of 256 (`states.py`). Random bits are a
function of seed, update and position: the bits of a run repeat.

`adamw` is one update of given lists; `optimizer.AdamW` keeps the moments of a fixed list of parameters.

Bytes per number, read and written: parameter 8 (bf16 4), gradient 4 (bf16 2), moments 16 (8-bit 4.06). FLOPs are
nothing beside them. On a CPU fp32 parameters with fp32 moments take torch's fused kernel.
Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.adamw.checks import check_gradients, check_options, check_parameters, check_states
from trine.kernels.adamw.formula import Step
from trine.kernels.adamw.kernel import launch_adamw
from trine.kernels.adamw.plain import plain_step
from trine.kernels.adamw.states import BLOCK
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    update: int,
    first_scales: Sequence[Tensor] = (),
    second_scales: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    stochastic_rounding: bool = True,
    seed: int = 0,
) -> None:
    """Update number `update` (from 1) of T parameters and their moments, in place; no gradients.

    `parameters` are contiguous, fp32 or bf16, `gradients` fp32 or bf16 in their shapes and not changed, all on one
    device. Moments are fp32 in the parameters' shapes, or with `first_scales` and `second_scales` in 8 bits, as
    `states.empty_states` makes them. `weight_decay` is one number, or one for each parameter. `grad_scale`, one fp32
    number, multiplies the gradients and is read where it lies, without waiting for the device. `stochastic_rounding` is
    about bf16 parameters; without it they are rounded to nearest. `seed` decides all random bits.

    Raises ValueError for what is not so, before anything is changed.
    """
    decays = [float(weight_decay)] * len(parameters) if isinstance(weight_decay, int | float) else list(weight_decay)
    check_options(betas, seed)
    check_parameters(parameters, decays)
    check_gradients(parameters, gradients, grad_scale, update)
    check_states(parameters, first_moments, second_moments, first_scales, second_scales)
    apply(
        list(parameters), list(gradients), list(first_moments), list(second_moments), list(first_scales),
        list(second_scales), decays, grad_scale, lr, betas, eps, update, seed, stochastic_rounding,
    )  # fmt: skip


def apply(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    first_scales: list[Tensor],
    second_scales: list[Tensor],
    weight_decays: list[float],
    grad_scale: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    update: int,
    seed: int,
    stochastic_rounding: bool,
) -> None:
    """One update of checked lists: by the registered operation where torch compiles the caller, plainly elsewhere.

    The plain call has the same bits. Handing T parameters to a registered operation costs about 8 us each: more than
    a GPU takes for a quarter of a million numbers.
    """
    if not parameters:
        return
    if torch.compiler.is_compiling():
        adamw_step(
            parameters, gradients, first_moments, second_moments, first_scales, second_scales, weight_decays,
            grad_scale, _on_host(lr), betas[0], betas[1], eps, update, seed, stochastic_rounding,
        )  # fmt: skip
        return
    step = Step(
        parameters, gradients, first_moments, second_moments, first_scales, second_scales, weight_decays, grad_scale,
        lr, betas, eps, update, seed, stochastic_rounding,
    )  # fmt: skip
    _run(step)


def _on_host(lr: float) -> Tensor:
    """The learning rate as a tensor. torch's compiler carries a float through a sum, and fixes it elsewhere."""
    return torch.zeros((), dtype=torch.float64, device="cpu") + lr


def _run(step: Step) -> None:
    if uses_triton(step.parameters[0]):
        launch_adamw(step)
    else:
        plain_step(step)


_CHANGED = ("parameters", "first_moments", "second_moments", "first_scales", "second_scales")


# The tables of addresses belong to one call, so a captured graph must not hold it.
@torch.library.custom_op("trine::adamw", mutates_args=_CHANGED, tags=(torch.Tag.cudagraph_unsafe,))
def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    first_scales: list[Tensor],
    second_scales: list[Tensor],
    weight_decays: list[float],
    grad_scale: Tensor | None,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    update: int,
    seed: int,
    stochastic_rounding: bool,
) -> None:
    """The registered operation: one update in place, on every device. `lr` is one number on the CPU.

    As a float, a learning rate that changes would have the caller compiled again at every update.
    """
    _check_lr(lr)
    if parameters:
        _run(
            Step(
                parameters, gradients, first_moments, second_moments, first_scales, second_scales, weight_decays,
                grad_scale, lr.item(), (beta1, beta2), eps, update, seed, stochastic_rounding,
            )
        )  # fmt: skip


@adamw_step.register_fake
def _(parameters: list[Tensor], *rest: Any) -> None:
    """Nothing is returned, and no shape changes."""
    _check_lr(rest[7])


def _check_lr(lr: Tensor) -> None:
    if lr.device.type != "cpu" or lr.numel() != 1:
        raise ValueError(f"lr is {tuple(lr.shape)} on {lr.device}; expected one number on the CPU")


def _sample_step(parameter: torch.dtype, gradient: torch.dtype, eight_bit: bool, rounding: bool) -> None:
    sizes = (4096 * 4096, 11008 * 4096, 4096)
    first, second = (torch.int8, torch.uint8) if eight_bit else (torch.float32, torch.float32)
    parameters, gradients, first_moments, second_moments = (
        [meta(size, dtype=dtype) for size in sizes] for dtype in (parameter, gradient, first, second)
    )
    scales = [meta(-(-size // BLOCK)) for size in sizes] if eight_bit else []
    launch_adamw(
        Step(
            parameters, gradients, first_moments, second_moments, scales, scales, [0.1] * len(sizes), meta(), 1e-3,
            (0.9, 0.95), 1e-8, 3, 7, rounding,
        )
    )  # fmt: skip


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    half, single = torch.bfloat16, torch.float32
    names = {single: "fp32", half: "bf16"}
    for parameter, gradient in ((single, single), (single, half), (half, half), (half, single)):
        for eight_bit in (False, True):
            name = f"adamw {names[gradient]} gradients, {'8-bit' if eight_bit else 'fp32'} states"
            yield Sample(name, parameter, partial(_sample_step, parameter, gradient, eight_bit, True))
    nearest = partial(_sample_step, half, half, False, False)
    yield Sample("adamw bf16 gradients, fp32 states, to nearest", half, nearest)
