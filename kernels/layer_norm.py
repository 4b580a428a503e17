"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension (biased variance).

Statistics in fp32; the result has the dtype of x. torch's own kernel is a single pass with fp32 accumulation, and on
the CPU takes bf16 activations with fp32 weights, so the public function is that kernel.

Shapes: N rows (any leading dimensions), C width. Source: Ba et al. 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    """The formula in fp32 (fp64 for fp64 inputs), rounded once at the end."""
    work = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.to(work)
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight_C.to(work)
    return (y if bias_C is None else y + bias_C.to(work)).to(x_NC.dtype)


def layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension; weight and bias of any float dtype; returns the dtype of x."""
    dtype = x_NC.dtype
    if x_NC.device.type == "cpu":
        # The CPU kernel sums the weight gradient in the dtype of the weight: 6 % off over 264 rows in bf16.
        dtype = torch.promote_types(dtype, torch.float32)
    # The mixed kernel wants both weight and bias, in fp32.
    bias = torch.zeros_like(weight_C, dtype=dtype) if bias_C is None else bias_C.to(dtype)
    return F.layer_norm(x_NC, (x_NC.shape[-1],), weight_C.to(dtype), bias, eps)
