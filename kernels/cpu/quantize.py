"""Activations as int8 codes with a scale a row on a CPU, in two passes over each row instead of torch's ten.

Formula and bits are those of `quantized/activations.py`. Bytes: M K b read twice, the second time from the cache, and
M K written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.kernels.cpu.compiled import array, available, use_torch_threads

# The largest code, and the smallest scale.
LIMIT, SMALLEST_SCALE = 127.0, 1e-30


def can_quantize(x: Tensor) -> bool:
    """Whether `int8_rows` takes x: compiled loops, on a CPU, not traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and available()


def int8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, K], scales fp32 [M, 1]) of rows in fp32, bf16 or fp16."""
    from trine.kernels.cpu.quantize_loops import quantize_int8

    use_torch_threads()
    rows_MK = (x_MK.float() if x_MK.dtype == torch.float16 else x_MK).contiguous()
    codes_MK, scales_M = torch.empty(x_MK.shape, dtype=torch.int8), torch.empty(len(x_MK))
    quantize_int8(array(rows_MK), LIMIT, SMALLEST_SCALE, array(codes_MK), array(scales_M))
    return codes_MK, scales_M[:, None]
