"""AdamW by torch: the CPU path. torch's fused kernel for fp32, the formula in pieces for bf16 and 8-bit moments."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.adamw.formula import Step, adamw_reference
from trine.kernels.adamw.rounding import FOR_MOMENTS, FOR_PARAMETER, draws, round_stochastically
from trine.kernels.adamw.states import BLOCK, decode, encode_first, encode_second

# Numbers that are worked on at a time, which keeps temporaries small. A multiple of 2048 (see `draws`).
PIECE = 2**18


def plain_step(step: Step) -> None:
    """Update the parameters and moments of this step in place."""
    for indices in step.groups():
        if step.eight_bit or step.parameters[indices[0]].dtype != torch.float32:
            _in_pieces(step, indices)
        else:
            _fused(step, indices)


def _fused(step: Step, indices: list[int]) -> None:
    """torch's fused kernel, once for each weight decay."""
    by_decay: dict[float, list[int]] = defaultdict(list)
    for i in indices:
        by_decay[step.weight_decays[i]].append(i)
    scale = step.grad_scale
    count = torch.tensor(float(step.update), device=step.parameters[0].device)
    for decay, some in by_decay.items():
        torch._fused_adamw_(
            [step.parameters[i] for i in some],
            [step.gradients[i].float() if scale is None else step.gradients[i].float() * scale for i in some],
            [step.first_moments[i] for i in some],
            [step.second_moments[i] for i in some],
            [],
            [count] * len(some),
            lr=step.lr,
            beta1=step.betas[0],
            beta2=step.betas[1],
            weight_decay=decay,
            eps=step.eps,
            amsgrad=False,
            maximize=False,
        )


def _in_pieces(step: Step, indices: list[int]) -> None:
    """The formula on one piece of a parameter after the other."""
    formula = {"lr": step.lr, "betas": step.betas, "eps": step.eps, "update": step.update}
    for i in indices:
        parameter, gradient = step.parameters[i].view(-1), step.gradients[i].reshape(-1)
        for start in range(0, parameter.numel(), PIECE):
            here = slice(start, start + PIECE)
            g = gradient[here].float()
            _piece(step, i, start, parameter[here], g if step.grad_scale is None else g * step.grad_scale, formula)


def _piece(step: Step, i: int, start: int, parameter: Tensor, gradient: Tensor, formula: dict[str, Any]) -> None:
    """Update the numbers of parameter `i` from `start` on."""
    size = parameter.numel()
    draw = partial(draws, size, parameter.device, seed=step.seed, tensor=i, update=step.update, start=start)
    m, v = (moments[i].view(-1)[start : start + size] for moments in (step.first_moments, step.second_moments))
    old_m, old_v = m, v
    if step.eight_bit:
        blocks = slice(start // BLOCK, -(-(start + size) // BLOCK))
        m_scales, v_scales = step.first_scales[i][blocks], step.second_scales[i][blocks]
        old_m, old_v = decode(m, m_scales), decode(v, v_scales)
    w, new_m, new_v = adamw_reference(
        parameter.float(), gradient, old_m, old_v, weight_decay=step.weight_decays[i], **formula
    )
    if parameter.dtype == torch.bfloat16 and step.stochastic_rounding:
        w = round_stochastically(w, draw(purpose=FOR_PARAMETER))
    parameter.copy_(w)
    if step.eight_bit:
        drawn = draw(purpose=FOR_MOMENTS)
        new_m, new_m_scales = encode_first(new_m, drawn)
        new_v, new_v_scales = encode_second(new_v, drawn)
        m_scales.copy_(new_m_scales)
        v_scales.copy_(new_v_scales)
    m.copy_(new_m)
    v.copy_(new_v)
