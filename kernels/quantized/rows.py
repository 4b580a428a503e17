"""Some rows of a packed weight as numbers: an embedding whose table is codes decodes no more than is looked up.

    y[r, k] = (q[i, k] - z[i, k // group]) s[i, k // group]        i = ids[r], in fp32, rounded once

Bytes: R K bits / 8 and the scales of these rows; 2 R K FLOPs.

Shapes: R rows that are looked up, N rows of the table, K numbers of a row, G groups of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trine.kernels.cpu.codes import LANES
from trine.kernels.quantized.packing import PackedWeight, unpack
from trine.kernels.quantized.reference import dequantize_reference
from trine.kernels.quantized.scaled_weight import ScaledWeight


def packed_rows(weight: PackedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of these numbers, [..., K] in `dtype` (float64 is computed in float64). `ids`: integers 0 to N - 1."""
    values_RK, scales_RG, zeros_RG = unpack(_chosen(weight, ids.flatten()))
    work = torch.promote_types(dtype, torch.float32)
    return dequantize_reference(values_RK, scales_RG, zeros_RG, work).to(dtype).view(*ids.shape, weight.width)


def dequantize(weight: PackedWeight | ScaledWeight, dtype: torch.dtype) -> Tensor:
    """All rows [N, K] in `dtype`."""
    if isinstance(weight, ScaledWeight):
        return weight.dequantize(dtype)
    values_NK, scales_NG, zeros_NG = unpack(weight)
    return dequantize_reference(values_NK, scales_NG, zeros_NG, torch.promote_types(dtype, torch.float32)).to(dtype)


def _chosen(weight: PackedWeight, ids_R: Tensor) -> PackedWeight:
    """A weight of these rows alone, in a layout that `unpack` reads."""
    scales, zeros = weight.scales[:, ids_R], None if weight.zeros is None else weight.zeros[:, ids_R]
    if weight.lanes is None:
        words = weight.words[:, ids_R] if weight.layout == "tiles" else weight.words[ids_R]
        return replace(weight, words=words, scales=scales, zeros=zeros, decode=None)
    # Tiles of one output instead of 16.
    tiles, lane = ids_R // LANES, ids_R % LANES
    old = weight.lanes
    words, lane_scales = (one[tiles, :, lane][:, :, None] for one in (old.words, old.scales))
    lane_zeros = None if old.zeros is None else old.zeros[tiles, :, lane][:, :, None]
    lanes = replace(old, words=words, scales=lane_scales, zeros=lane_zeros, num_features=len(ids_R))
    return replace(weight, words=words, scales=scales, zeros=zeros, lanes=lanes)
