"""What the norms refuse, before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from trine.kernels.target import uses_triton


def check_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None = None, residual_NC: Tensor | None = None) -> None:
    """Raises ValueError where dtypes or shapes do not fit, or for float64 on a GPU."""
    for name, vector in (("weight", weight_C), ("bias", bias_C)):
        if vector is None:
            continue
        if x_NC.dim() == 0 or vector.shape != x_NC.shape[-1:]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)} but x has {tuple(x_NC.shape)}; expected [C] for [..., C]"
            )
        if not (x_NC.is_floating_point() and vector.is_floating_point()):
            raise ValueError(f"x is {x_NC.dtype} and {name} {vector.dtype}; both must be floating point")
    if residual_NC is not None and (x_NC.dtype != residual_NC.dtype or x_NC.shape != residual_NC.shape):
        raise ValueError(
            f"x is {x_NC.dtype} {tuple(x_NC.shape)} but residual is {residual_NC.dtype} {tuple(residual_NC.shape)}; "
            "they must agree"
        )
    if uses_triton(x_NC) and x_NC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x_NC.dtype}, which the kernel does not support; use float32, bfloat16 or float16")
