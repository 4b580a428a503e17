"""Products of several rows with 4- and 8-bit codes on CPUs that multiply bytes (vpdpbusd): `planes_loops.py`.

Shapes: M rows, K inputs, N outputs. Bytes: N K bits / 8, and twice (fp32: four times) those of x as int8; 2 M N K
FLOPs, as many instructions as in bf16. Inputs of bf16 are rounded to 15 bits of the largest in their chunk, 2^-7 of
what bf16 itself rounds there; those of fp32 and fp16 to 29.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.codes import LANES, LanesWeight
from trine.kernels.cpu.compiled import use_torch_threads
from trine.kernels.cpu.projection import lanes_fields


def planes_matmul(x_MK: Tensor, weight: LanesWeight, bias_N: Tensor | None = None) -> Tensor:
    """x w^T + bias in the dtype of x (fp32, bf16 or fp16). Shapes are not checked."""
    from trine.kernels.cpu.planes_loops import multiply_planes

    use_torch_threads()
    half, outputs = x_MK.dtype == torch.bfloat16, len(weight.words) * LANES
    x = x_MK.contiguous() if half else x_MK.float().contiguous()
    y_MX = torch.empty(len(x), outputs, dtype=x.dtype)
    bias = torch.zeros(outputs) if bias_N is None else F.pad(bias_N.float(), (0, outputs - len(bias_N)))
    keep: list[Any] = []
    fields, shifts = np.array(lanes_fields(weight, bias, keep), np.int64), weight.arguments[1]
    pairs = 1 if half else 2
    multiply_planes(fields.ctypes.data, shifts, weight.bits, pairs, x.data_ptr(), len(x), y_MX.data_ptr(), half)
    return y_MX[:, : weight.num_features].to(x_MK.dtype)
