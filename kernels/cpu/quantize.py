"""Activations as int8 codes or float8 numbers on a CPU, in passes over each row that stays in the cache, instead of
torch's ten over all of them; and what multiplies a product's sums by its scales.

Formula and bits are those of `quantized/activations.py`. Bytes: M K b read and M K (float8, as bf16: twice that)
written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.kernels.cpu.compiled import array, available, single, use_torch_threads

# The largest codes, and the smallest scale.
LIMIT, FLOAT8_LIMIT, SMALLEST_SCALE = 127.0, 448.0, 1e-30


def can_quantize(x: Tensor) -> bool:
    """Whether the functions below take x: compiled loops, on a CPU, not traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and available()


def int8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [M, K], scales fp32 [M, 1]) of rows in fp32, bf16 or fp16."""
    from trine.kernels.cpu.quantize_loops import quantize_int8

    use_torch_threads()
    rows_MK = _rows(x_MK)
    codes_MK, scales_M = torch.empty(x_MK.shape, dtype=torch.int8), torch.empty(len(x_MK))
    quantize_int8(array(rows_MK), LIMIT, SMALLEST_SCALE, array(codes_MK), array(scales_M))
    return codes_MK, scales_M[:, None]


def float8_rows(x_MK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(numbers of float8 e4m3 in bf16 [M, K], scales fp32, one for each `block` of a row) of fp32, bf16 or fp16."""
    from trine.kernels.cpu.quantize_loops import quantize_e4m3

    use_torch_threads()
    M, K = x_MK.shape
    numbers_MK, scales_MB = torch.empty(M, K, dtype=torch.bfloat16), torch.empty(M, -(-K // block))
    quantize_e4m3(array(_rows(x_MK)), block, FLOAT8_LIMIT, SMALLEST_SCALE, array(numbers_MK), array(scales_MB))
    return numbers_MK, scales_MB


def scaled_numbers(numbers_MK: Tensor, scales_MB: Tensor, block: int) -> Tensor:
    """Numbers in bf16 times their scales, those of `float8_rows`, rounded to bf16."""
    from trine.kernels.cpu.quantize_loops import scale_numbers

    use_torch_threads()
    scaled_MK = torch.empty_like(numbers_MK)
    scale_numbers(array(numbers_MK.contiguous()), single(scales_MB), block, array(scaled_MK))
    return scaled_MK


def scaled(sums_MN: Tensor, x_scales_M: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """sums x_scales scales + bias in fp32, rounded to bf16, which the sums are in; in their place."""
    from trine.kernels.cpu.quantize_loops import scale_sums

    use_torch_threads()
    y_MN = array(sums_MN)
    scale_sums(y_MN, single(x_scales_M), single(scales_N), single(bias_N), y_MN)
    return sums_MN


def _rows(x_MK: Tensor) -> Tensor:
    return (x_MK.float() if x_MK.dtype == torch.float16 else x_MK).contiguous()
