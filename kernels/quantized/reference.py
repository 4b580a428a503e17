"""What the quantized products compute, in plain torch: the oracle of their tests.

Everything is dequantized and multiplied in `work`, float64 by default, and rounded nowhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.mlp.activation import activate, gated, gated_clamped


def dequantize_reference(
    values_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, work: torch.dtype = torch.float64
) -> Tensor:
    """w[n, k] = (q[n, k] - z[n, k // group]) s[n, k // group] for integer or float8 codes [N, K]."""
    num_features, width = values_NK.shape
    groups = scales_NG.shape[1]
    codes = values_NK.to(work).view(num_features, groups, width // max(1, groups))
    if zeros_NG is not None:
        codes = codes - zeros_NG.to(work)[:, :, None]
    return (codes * scales_NG.to(work)[:, :, None]).view(num_features, width)


def block_scales(scales_BB: Tensor, num_features: int, width: int, block: int) -> Tensor:
    """Scales of blocks [ceil(N / block), ceil(K / block)] as one for each number [N, K]."""
    return scales_BB.repeat_interleave(block, 0)[:num_features].repeat_interleave(block, 1)[:, :width]


def product_reference(
    x_MK: Tensor,
    gate_NK: Tensor | None,
    up_NK: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
) -> Tensor:
    """The product with dequantized weights in their dtype, with its bias and activation or gate."""

    def linear(w_NK: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_MK.to(w_NK.dtype), w_NK, None if bias is None else bias.to(w_NK.dtype))

    return apply(None if gate_NK is None else linear(gate_NK, gate_bias), linear(up_NK, up_bias), activation, limit)


def apply(gate_MN: Tensor | None, up_MN: Tensor, activation: str, limit: float | None) -> Tensor:
    """The activation or gate of the sums; "none" is none."""
    if activation == "none":
        return up_MN
    if gate_MN is None:
        return activate(up_MN, activation)
    return gated(gate_MN, up_MN, activation) if limit is None else gated_clamped(gate_MN, up_MN, limit)
