"""Products with quantized weights on a CPU, with torch's own kernels.

4 and 8 bits with bf16 rows: up to `FEW_ROWS` torch's kernels that read the packed weight (int4pack; int8pack, which is
for symmetric weights with one scale a row). They take scales in bf16, so that there a weight is rounded once more than
the dequantized one, by as much. All else is multiplied piece by piece: some rows of the weight are dequantized into a
buffer that fits a cache, then torch's product reads it there.

int8 codes: an exact integer product (`cpu_int8.py`), then the scales. float8 codes: kept as bf16, which holds them
exactly; a float8 product is 20 times slower than one in bf16 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.cpu_int8 import int8_product
from trine.kernels.quantized.packing import PackedWeight
from trine.kernels.quantized.scaled_weight import ScaledWeight

# By bits: where dequantizing begins to cost less than torch's kernels lose against a bf16 product. Measured at 2048 x
# 2048 and 4096 x 4096 on one core of an AVX512 CPU.
FEW_ROWS = {4: 64, 8: 24}
# Numbers of the weight dequantized at a time: 2 MiB in bf16.
_PIECE_NUMBERS = 2**20


def dequantize_rows(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """w_NK in `dtype`: (q - z) s, rounded once."""
    w_NK = torch.empty(weight.num_features, weight.width, dtype=dtype)
    step = _piece_rows(weight.width)
    for first in range(0, weight.num_features, step):
        _dequantize_piece(weight, first, w_NK[first : first + step])
    return w_NK


def _piece_rows(width: int) -> int:
    return max(1, _PIECE_NUMBERS // max(1, width))


def _dequantize_piece(weight: PackedWeight, first: int, out_nK: Tensor) -> None:
    """Fill out_nK with the rows from `first` on. q - z is exact in every dtype; the product is rounded once."""
    rows = slice(first, first + len(out_nK))
    codes = weight.words[rows]
    if weight.bits == 8:
        out_nK.copy_(codes)
    else:
        codes = codes.view(torch.int8)
        out_nK[:, ::2].copy_(codes << 4 >> 4)
        out_nK[:, 1::2].copy_((codes >> 4)[:, : weight.width // 2])
    grouped = out_nK.view(len(out_nK), -1, weight.group_size)
    if weight.zeros is not None:
        grouped -= weight.zeros.t()[rows, :, None].to(out_nK.dtype)
    torch.mul(grouped, weight.scales.t()[rows, :, None].float(), out=grouped)


def weight_only_rows(x_MK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor:
    """x w^T + bias in the dtype of x; differentiable in x and the bias."""
    if torch.is_grad_enabled() and (x_MK.requires_grad or (bias_N is not None and bias_N.requires_grad)):
        y_MN: Tensor = _Product.apply(x_MK, weight)  # type: ignore[no-untyped-call]
        return _add(y_MN, bias_N)
    if x_MK.dtype == torch.bfloat16 and 0 < len(x_MK) <= FEW_ROWS[weight.bits]:
        few = _few_rows(x_MK.contiguous(), weight)
        if few is not None:
            return _add(few, bias_N)
    return _in_pieces(x_MK, weight, bias_N)


def _add(y_MN: Tensor, bias_N: Tensor | None) -> Tensor:
    return y_MN if bias_N is None else y_MN + bias_N.to(y_MN.dtype)


def _few_rows(x_MK: Tensor, weight: PackedWeight) -> Tensor | None:
    """By torch's kernels for packed weights; None where they cannot."""
    if weight.decode is not None:
        codes, pairs_GN2, *rest = weight.decode
        groups = pairs_GN2.shape[0]
        y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, codes, weight.width // groups, pairs_GN2)
        for rest_NG in rest:
            y_MN += F.linear(x_MK.view(len(x_MK), groups, -1).sum(dim=-1), rest_NG)
        return y_MN
    symmetric = weight.bits == 8 and weight.zeros is None and weight.num_features > 0
    # Rows that are no multiple of 16 numbers long crash the kernel (torch 2.13).
    if symmetric and weight.width % 32 == 0 and len(weight.scales) == 1:
        return torch._weight_int8pack_mm(x_MK, weight.words, weight.scales[0].bfloat16())
    return None


def _in_pieces(x_MK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor:
    y_MN = x_MK.new_empty(len(x_MK), weight.num_features)
    bias_N = None if bias_N is None else bias_N.to(x_MK.dtype)
    for rows, w_nK in _pieces(weight, x_MK.dtype):
        y_MN[:, rows] = F.linear(x_MK, w_nK, None if bias_N is None else bias_N[rows])
    return y_MN


def _pieces(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of one piece after the other, dequantized into one buffer."""
    step = min(_piece_rows(weight.width), weight.num_features)
    buffer_nK = torch.empty(step, weight.width, dtype=dtype)
    for first in range(0, weight.num_features, max(1, step)):
        w_nK = buffer_nK[: weight.num_features - first]
        _dequantize_piece(weight, first, w_nK)
        yield slice(first, first + len(w_nK)), w_nK


class _Product(torch.autograd.Function):
    """x w^T; the weight is dequantized again in the backward."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return _in_pieces(x_MK, weight, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy_MN,) = grads
        dx_MK = torch.zeros(len(dy_MN), ctx.weight.width, dtype=torch.promote_types(dy_MN.dtype, torch.float32))
        for rows, w_nK in _pieces(ctx.weight, dy_MN.dtype):
            dx_MK += dy_MN[:, rows] @ w_nK
        return dx_MK.to(dy_MN.dtype), None


def scaled_rows(
    x_codes_MK: Tensor, x_scales: Tensor, weight: ScaledWeight, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of codes with its scales and bias, in fp32, for a result in `dtype`."""
    codes_NK, scales, num_features = weight.codes, weight.scales, weight.num_features
    if weight.kind == torch.int8:
        sums_MN = int8_product(x_codes_MK, codes_NK, num_features, packed=weight.packed)
        y_MN = sums_MN.mul_(x_scales.view(-1, 1)).mul_(scales)
    elif not weight.blocked:
        y_MN = _float8_product(x_codes_MK, codes_NK, dtype).mul_(x_scales.view(-1, 1)).mul_(scales)
    else:
        y_MN = torch.zeros(len(x_codes_MK), num_features)
        for block, first in enumerate(range(0, weight.width, BLOCK)):
            part = slice(first, first + BLOCK)
            sums_MN = _float8_product(x_codes_MK[:, part], codes_NK[:, part], dtype)
            spread_N = scales[:, block].repeat_interleave(BLOCK)[:num_features]
            y_MN += sums_MN.mul_(x_scales[:, block, None]).mul_(spread_N)
    return y_MN if bias_N is None else y_MN + bias_N.float()


def _float8_product(x_MK: Tensor, w_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in fp32; for results in bf16 they come rounded to it."""
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return F.linear(x_MK.to(work), w_NK.to(work)).float()
