"""The numbers that quantized experts stand for, from the plain tensors they are packed of: the oracle of their tests.

By tables and torch's own conversions, in `work`, float64 by default; the layer is then `moe.op.moe_mlp_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.kernels.quantized.reference import block_scales, dequantize_reference

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def packed_reference(
    values_ENK: Tensor, scales_ENG: Tensor, zeros_ENG: Tensor | None = None, work: torch.dtype = torch.float64
) -> Tensor:
    """w_ENK of what `pack_experts` takes."""
    zeros = [None] * len(values_ENK) if zeros_ENG is None else zeros_ENG.unbind(0)
    each = zip(values_ENK.unbind(0), scales_ENG.unbind(0), zeros, strict=True)
    return torch.stack([dequantize_reference(*tensors, work) for tensors in each])


def float8_reference(codes_ENK: Tensor, scales: Tensor, work: torch.dtype = torch.float64) -> Tensor:
    """w_ENK of what `float8_experts` takes."""
    num_experts, num_features, width = codes_ENK.shape
    blocks = (-(-num_features // 128), -(-width // 128))
    one_each = scales.numel() in (num_experts, num_experts * num_features)
    if tuple(scales.shape[1:]) == blocks and not one_each:
        spread = torch.stack([block_scales(of.to(work), num_features, width, 128) for of in scales.unbind(0)])
    else:
        spread = scales.to(work).reshape(num_experts, -1, 1)
    return codes_ENK.to(work) * spread


def mxfp4_reference(blocks_ENGB: Tensor, scales_ENG: Tensor, work: torch.dtype = torch.float64) -> Tensor:
    """w_ENK of what `mxfp4_experts` takes."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=work, device=blocks_ENGB.device)
    codes = torch.stack((blocks_ENGB & 15, blocks_ENGB >> 4), dim=-1).flatten(-2)
    return (table[codes.long()] * torch.exp2(scales_ENG.to(work) - 127)[..., None]).flatten(2)
