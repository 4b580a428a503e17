"""AdamW over many parameters in one pass, with decoupled weight decay.

With gradient G (times `grad_scale`), moments m and v, update number t and rates b1, b2:

    w <- (1 - lr decay) w;    m <- b1 m + (1 - b1) G;    v <- b2 v + (1 - b2) G^2
    w <- w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

All of it in fp32, in one Triton launch for all parameters of one pair of dtypes (parameter and gradient), whatever
their number and shapes. Parameters are fp32, or bf16 with stochastic rounding (`rounding.py`), which keeps the small
updates that rounding to nearest loses; moments are fp32, or 8 bits in blocks of 256 (`states.py`). Random bits are a
function of seed, update and position: the bits of a run repeat.

Bytes per number, read and written: parameter 8 (bf16 4), gradient 4 (bf16 2), moments 16 (8-bit 4.06). FLOPs are
nothing beside them. On a CPU fp32 parameters with fp32 moments take torch's fused kernel.
Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.adamw.kernel import Formula, Tables, launch_adamw
from trine.kernels.adamw.rounding import FOR_MOMENTS, FOR_PARAMETER, draws, round_stochastically
from trine.kernels.adamw.states import BLOCK, decode, empty_states, encode_first, encode_second
from trine.kernels.multi_tensor import addresses, one_device, upload
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton

# Numbers that the plain path works on at a time, which keeps its temporaries small. A multiple of 2048 (see `draws`).
_PIECE = 2**18
STATE_DTYPES = (torch.float32, torch.int8)
_DTYPES = (torch.float32, torch.bfloat16)


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
    formula = _formula(lr, betas, eps, update)
    w = w - w * (lr * weight_decay)
    m = m * formula.beta1 + gradient * formula.rest1
    v = v * formula.beta2 + gradient * gradient * formula.rest2
    return w - m * formula.step / (v.sqrt() * formula.root + eps), m, v


def _formula(lr: float, betas: tuple[float, float], eps: float, update: int) -> Formula:
    beta1, beta2 = betas
    step, root = lr / (1 - beta1**update), 1 / math.sqrt(1 - beta2**update)
    return Formula(lr, step, root, beta1, beta2, 1 - beta1, 1 - beta2, eps)


class AdamW:
    """AdamW over a fixed list of parameters, which must stay where they are in memory.

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
        self._check(state_dtype)
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
        self._uploaded: dict[tuple[int, ...], tuple[list[int], Tables]] = {}

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
        if update < 1:
            raise ValueError(f"update is {update}; updates are counted from 1")
        gradients = self._gradients(gradients)
        if grad_scale is not None and (grad_scale.numel() != 1 or grad_scale.dtype != torch.float32):
            raise ValueError(f"grad_scale is {grad_scale.dtype} {tuple(grad_scale.shape)}; expected one float32 number")
        on_triton = uses_triton(self.parameters[0]) or self.parameters[0].is_meta
        for indices in _groups(self.parameters, gradients):
            if on_triton:
                self._step_triton(indices, gradients, lr, update, grad_scale)
            elif self.eight_bit or self.parameters[indices[0]].dtype != torch.float32:
                self._step_plain(indices, gradients, lr, update, grad_scale)
            else:
                self._step_fused(indices, gradients, lr, update, grad_scale)

    def _gradients(self, given: Sequence[Tensor] | None) -> list[Tensor]:
        """The gradient of each parameter, checked."""
        gradients = [parameter.grad for parameter in self.parameters] if given is None else given
        if len(gradients) != len(self.parameters):
            raise ValueError(f"{len(gradients)} gradients for {len(self.parameters)} parameters")
        found = []
        for place, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                raise ValueError(f"parameter {place}, of shape {tuple(parameter.shape)}, has no gradient")
            if gradient.dtype not in _DTYPES or gradient.shape != parameter.shape:
                raise ValueError(
                    f"the gradient of parameter {place} is {gradient.dtype} {tuple(gradient.shape)}; "
                    f"expected float32 or bfloat16 {tuple(parameter.shape)}"
                )
            if gradient.device != parameter.device:
                raise ValueError(f"parameter {place} is on {parameter.device}, its gradient on {gradient.device}")
            found.append(gradient)
        return found

    def _step_triton(
        self, indices: list[int], gradients: list[Tensor], lr: float, update: int, scale: Tensor | None
    ) -> None:
        parameters = [self.parameters[i] for i in indices]
        # Kept alive until the launch is in the stream.
        dense = [gradients[i].contiguous() for i in indices]
        launch_adamw(
            self._tables(indices, addresses(parameters), addresses(dense)),
            tuple(parameter.numel() for parameter in parameters),
            _formula(lr, self.betas, self.eps, update),
            dtypes=(parameters[0].dtype, dense[0].dtype),
            eight_bit=self.eight_bit,
            stochastic=self.stochastic_rounding,
            scale=scale,
            seed=self.seed,
            update=update,
        )

    def _tables(self, indices: list[int], parameters: list[int], gradients: list[int]) -> Tables:
        """The tables of a group on the device; addresses travel only where they changed."""
        key = tuple(indices)
        known, tables = self._uploaded.get(key, ([], None))
        current = parameters + gradients
        if tables is not None and known == current:
            return tables
        lists = [self.first_moments, self.second_moments]
        lists += [self.first_scales, self.second_scales] if self.eight_bit else []
        current_all = current + [address for tensors in lists for address in addresses([tensors[i] for i in indices])]
        device = self.parameters[0].device
        table = upload(current_all, torch.int64, device)
        if tables is None:
            decays = upload([self.weight_decays[i] for i in indices], torch.float32, device)
            tables = Tables(table, decays, upload(indices, torch.int32, device))
        else:
            tables = Tables(table, tables.decays_T, tables.numbers_T)
        self._uploaded[key] = current, tables
        return tables

    def _step_fused(
        self, indices: list[int], gradients: list[Tensor], lr: float, update: int, scale: Tensor | None
    ) -> None:
        """torch's fused kernel, once for each weight decay."""
        by_decay: dict[float, list[int]] = defaultdict(list)
        for i in indices:
            by_decay[self.weight_decays[i]].append(i)
        count = torch.tensor(float(update), device=self.parameters[0].device)
        for decay, some in by_decay.items():
            torch._fused_adamw_(
                [self.parameters[i] for i in some],
                [gradients[i].float() if scale is None else gradients[i].float() * scale for i in some],
                [self.first_moments[i] for i in some],
                [self.second_moments[i] for i in some],
                [],
                [count] * len(some),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def _step_plain(
        self, indices: list[int], gradients: list[Tensor], lr: float, update: int, scale: Tensor | None
    ) -> None:
        """The formula on one piece of a parameter after the other."""
        formula = {"lr": lr, "betas": self.betas, "eps": self.eps, "update": update}
        for i in indices:
            parameter, gradient = self.parameters[i].view(-1), gradients[i].reshape(-1)
            for start in range(0, parameter.numel(), _PIECE):
                here = slice(start, start + _PIECE)
                g = gradient[here].float()
                self._piece(i, start, parameter[here], g if scale is None else g * scale, formula)

    def _piece(self, i: int, start: int, parameter: Tensor, gradient: Tensor, formula: dict[str, Any]) -> None:
        """Update the numbers of parameter `i` from `start` on."""
        size = parameter.numel()
        draw = partial(draws, size, parameter.device, seed=self.seed, tensor=i, update=formula["update"], start=start)
        m, v = (moments[i].view(-1)[start : start + size] for moments in (self.first_moments, self.second_moments))
        old_m, old_v = m, v
        if self.eight_bit:
            blocks = slice(start // BLOCK, -(-(start + size) // BLOCK))
            m_scales, v_scales = self.first_scales[i][blocks], self.second_scales[i][blocks]
            old_m, old_v = decode(m, m_scales), decode(v, v_scales)
        w, new_m, new_v = adamw_reference(
            parameter.float(), gradient, old_m, old_v, weight_decay=self.weight_decays[i], **formula
        )
        if parameter.dtype == torch.bfloat16 and self.stochastic_rounding:
            w = round_stochastically(w, draw(purpose=FOR_PARAMETER))
        parameter.copy_(w)
        if self.eight_bit:
            drawn = draw(purpose=FOR_MOMENTS)
            new_m, new_m_scales = encode_first(new_m, drawn)
            new_v, new_v_scales = encode_second(new_v, drawn)
            m_scales.copy_(new_m_scales)
            v_scales.copy_(new_v_scales)
        m.copy_(new_m)
        v.copy_(new_v)

    def _check(self, state_dtype: torch.dtype) -> None:
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype is {state_dtype}; supported are float32 and int8")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must be at least 0 and below 1")
        if len(self.weight_decays) != len(self.parameters):
            raise ValueError(f"{len(self.weight_decays)} weight decays for {len(self.parameters)} parameters")
        for place, parameter in enumerate(self.parameters):
            if parameter.dtype not in _DTYPES:
                raise ValueError(f"parameter {place} is {parameter.dtype}; supported are float32 and bfloat16")
            if not parameter.is_contiguous():
                raise ValueError(f"parameter {place} has strides {parameter.stride()}; it must be contiguous")
        if self.parameters:
            one_device(self.parameters, "parameters")


def _groups(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors, by the dtypes of parameter and gradient."""
    by_dtypes: dict[tuple[torch.dtype, torch.dtype], list[int]] = defaultdict(list)
    for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        by_dtypes[parameter.dtype, gradient.dtype].append(place)
    return list(by_dtypes.values())


def _sample_step(parameter: torch.dtype, gradient: torch.dtype, state: torch.dtype, rounding: bool) -> None:
    parameters = [meta(size, dtype=parameter) for size in (4096 * 4096, 11008 * 4096, 4096)]
    gradients = [torch.empty_like(tensor, dtype=gradient) for tensor in parameters]
    optimizer = AdamW(
        parameters,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        state_dtype=state,
        stochastic_rounding=rounding,
        seed=7,
    )
    optimizer.step(1e-3, update=3, gradients=gradients, grad_scale=meta())


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    half, single, quarter = torch.bfloat16, torch.float32, torch.int8
    for parameter, gradient in ((single, single), (single, half), (half, half), (half, single)):
        for state in (single, quarter):
            names = {single: "fp32", half: "bf16"}
            name = f"adamw {names[gradient]} gradients, {'8-bit' if state == quarter else 'fp32'} states"
            yield Sample(name, parameter, partial(_sample_step, parameter, gradient, state, True))
    nearest = partial(_sample_step, half, half, single, False)
    yield Sample("adamw bf16 gradients, fp32 states, to nearest", half, nearest)
