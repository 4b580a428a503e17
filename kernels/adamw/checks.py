"""What AdamW refuses, before anything is changed: each function raises ValueError that names the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trine.kernels.adamw.states import BLOCK
from trine.kernels.multi_tensor import one_device

STATE_DTYPES = (torch.float32, torch.int8)
_DTYPES = (torch.float32, torch.bfloat16)


def check_options(betas: tuple[float, float], seed: int) -> None:
    """Refuse rates and seeds out of range."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; both must be at least 0 and below 1")


def check_parameters(parameters: Sequence[Tensor], weight_decays: Sequence[float]) -> None:
    """Refuse parameters that are not contiguous, fp32 or bf16, on one device, and lists of different lengths."""
    if len(weight_decays) != len(parameters):
        raise ValueError(f"{len(weight_decays)} weight decays for {len(parameters)} parameters")
    for place, parameter in enumerate(parameters):
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"parameter {place} is {parameter.dtype}; supported are float32 and bfloat16")
        if not parameter.is_contiguous():
            raise ValueError(f"parameter {place} has strides {parameter.stride()}; it must be contiguous")
    if parameters:
        one_device(parameters, "parameters")


def check_gradients(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], grad_scale: Tensor | None, update: int
) -> list[Tensor]:
    """The gradient of each parameter; refuse what a step is given and does not fit."""
    if update < 1:
        raise ValueError(f"update is {update}; updates are counted from 1")
    if len(gradients) != len(parameters):
        raise ValueError(f"{len(gradients)} gradients for {len(parameters)} parameters")
    found = []
    for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
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
    if grad_scale is not None and (grad_scale.numel() != 1 or grad_scale.dtype != torch.float32):
        raise ValueError(f"grad_scale is {grad_scale.dtype} {tuple(grad_scale.shape)}; expected one float32 number")
    if grad_scale is not None and parameters and grad_scale.device != parameters[0].device:
        raise ValueError(f"grad_scale is on {grad_scale.device}, the parameters on {parameters[0].device}")
    return found


def check_states(
    parameters: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    first_scales: Sequence[Tensor],
    second_scales: Sequence[Tensor],
) -> None:
    """Refuse moments that are not fp32, nor 8-bit with their scales."""
    eight_bit = bool(first_scales) or bool(second_scales)
    kinds = [
        ("first moment", first_moments, torch.int8 if eight_bit else torch.float32, 1),
        ("second moment", second_moments, torch.uint8 if eight_bit else torch.float32, 1),
    ]
    if eight_bit:
        kinds += [
            ("scale of the first moment", first_scales, torch.float32, BLOCK),
            ("scale of the second moment", second_scales, torch.float32, BLOCK),
        ]
    for name, tensors, dtype, block in kinds:
        if len(tensors) != len(parameters):
            raise ValueError(f"the {name} is given {len(tensors)} times for {len(parameters)} parameters")
        for place, (parameter, tensor) in enumerate(zip(parameters, tensors, strict=True)):
            shape = (-(-parameter.numel() // block),) if eight_bit else parameter.shape
            if tensor.dtype != dtype or tensor.shape != shape or tensor.device != parameter.device:
                raise ValueError(
                    f"the {name} of parameter {place} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                    f"expected {dtype} {tuple(shape)} on {parameter.device} ({'with' if eight_bit else 'without'} "
                    "scales; empty_states makes 8-bit moments)"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"the {name} of parameter {place} has strides {tensor.stride()}; make it contiguous")
