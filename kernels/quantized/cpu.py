"""Products with quantized weights on a CPU, each by the path that was measured fastest (`kernels/cpu/table.py`).

4 and 8 bits: few rows by compiled loops, or without Numba by torch's kernels for packed weights (int4pack; int8pack,
for symmetric weights with one scale a row), which take bf16 rows and scales in bf16, so that there a weight is rounded
once more than the dequantized one, by as much. Many rows are multiplied piece by piece: some outputs of the weight are
dequantized into a buffer, where torch's product reads them, or of bf16 the CPU's matrix tiles (slabs); a CPU without
tiles that multiplies bytes takes the codes as they are (planes). Rows in fp16 are
multiplied in fp32: torch's product of fp16 is 10 times slower than that where a CPU has no instructions for it.

int8 codes: exact integer sums, scaled before they leave the cache, by compiled loops (`kernels/cpu/matvec.py`) or, from
some rows on, in matrix tiles (`kernels/cpu/byte_tiles.py`); elsewhere torch's integer product (`cpu_int8.py`), then the
scales. float8 codes: few rows by loops that decode them in registers, more in panels or by bf16 numbers, which hold
them exactly (`kernels/cpu/float_rows.py`); where there are no such loops the numbers are what is kept. In pieces, for a
result in bf16 by a weight with scales of blocks, rows and weight are multiplied by their scales and rounded before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import byte_tiles, float_rows
from trine.kernels.cpu.codes import codes_matvec, dequantize_lanes, lanes_pieces, slabs_matmul, tiles_matmul
from trine.kernels.cpu.float8 import to_bfloat16
from trine.kernels.cpu.matvec import compiled_codes_matvec
from trine.kernels.cpu.planes import planes_matmul
from trine.kernels.cpu.projection import SHORTEST
from trine.kernels.cpu.quantize import can_quantize, scaled, scaled_numbers
from trine.kernels.cpu.table import FLOAT8_PATHS, LANES_PATHS, ROWS_PATHS, choose
from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.cpu_int8 import int8_product
from trine.kernels.quantized.packing import PackedWeight, unpack
from trine.kernels.quantized.scaled_weight import ScaledWeight

# Numbers of the weight dequantized by torch at a time: 4 MiB in fp32.
_PIECE_NUMBERS = 2**20


def dequantize_rows(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """w_NK in `dtype`: (q - z) s in fp32, rounded once."""
    if weight.lanes is not None and not torch.compiler.is_compiling():
        return dequantize_lanes(weight.lanes, dtype if dtype == torch.bfloat16 else torch.float32).to(dtype)
    w_NK = torch.empty(weight.num_features, weight.width, dtype=dtype)
    step = _piece_rows(weight.width)
    for first in range(0, weight.num_features, step):
        w_NK[first : first + step] = _dequantize_piece(weight, slice(first, first + step))
    return w_NK


def _piece_rows(width: int) -> int:
    return max(1, _PIECE_NUMBERS // max(1, width))


def _dequantize_piece(weight: PackedWeight, rows: slice) -> Tensor:
    """Some rows of w_NK in fp32, by torch. (bf16 times fp32 would take ten times as long as fp32 throughout.)"""
    if weight.lanes is not None:
        w_nK = unpack(weight)[0][rows].float()
    elif weight.bits == 8:
        w_nK = weight.words[rows].float()
    else:
        codes = weight.words[rows].view(torch.int8)
        w_nK = torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(1)[:, : weight.width].float()
    grouped = w_nK.view(len(w_nK), -1, weight.group_size)
    if weight.zeros is not None:
        grouped -= weight.zeros.t()[rows, :, None].float()
    grouped *= weight.scales.t()[rows, :, None].float()
    return w_nK


def weight_only_rows(x_MK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor:
    """x w^T + bias in the dtype of x; differentiable in x and the bias."""
    if torch.is_grad_enabled() and (x_MK.requires_grad or (bias_N is not None and bias_N.requires_grad)):
        y_MN: Tensor = _Product.apply(x_MK, weight)  # type: ignore[no-untyped-call]
        return _add(y_MN, bias_N)
    if not torch.compiler.is_compiling() and len(x_MK):
        multiplied = _from_codes(x_MK, weight, bias_N)
        if multiplied is not None:
            return multiplied
    return _in_pieces(x_MK, weight, bias_N)


def _add(y_MN: Tensor, bias_N: Tensor | None) -> Tensor:
    return y_MN if bias_N is None else y_MN + bias_N.to(y_MN.dtype)


def _from_codes(x_MK: Tensor, weight: PackedWeight, bias_N: Tensor | None) -> Tensor | None:
    """By what reads the packed weight; None where the table prefers to dequantize it before, or nothing can."""
    half = x_MK.dtype == torch.bfloat16
    kind = f"{weight.bits} bits by {'bfloat16' if half else 'float32'}"
    if weight.lanes is not None:
        path = choose(kind, len(x_MK), LANES_PATHS)
        known = {"loops": codes_matvec, "planes": planes_matmul, "tiles": tiles_matmul, "slabs": slabs_matmul}
        multiply = known.get(path)
        return None if multiply is None else multiply(x_MK, weight.lanes, bias_N)
    if choose(kind, len(x_MK), ROWS_PATHS) == "torch" or not half:
        return None
    y_MN = _packed_product(x_MK.contiguous(), weight)
    return None if y_MN is None else _add(y_MN, bias_N)


def _packed_product(x_MK: Tensor, weight: PackedWeight) -> Tensor | None:
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
    work = torch.float32 if x_MK.dtype == torch.float16 else x_MK.dtype
    rows_MK = x_MK.to(work)
    y_MN = rows_MK.new_empty(len(x_MK), weight.num_features)
    for outputs, w_Kn in _pieces(weight, work):
        y_MN[:, outputs] = rows_MK @ w_Kn
    return _add(y_MN, bias_N).to(x_MK.dtype)


def _pieces(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some outputs after the other as w_Kn, in a buffer that the next piece may overwrite."""
    if weight.lanes is not None and not torch.compiler.is_compiling():
        yield from lanes_pieces(weight.lanes, dtype)
        return
    step = _piece_rows(weight.width)
    for first in range(0, weight.num_features, step):
        rows = slice(first, min(first + step, weight.num_features))
        yield rows, _dequantize_piece(weight, rows).to(dtype).t()


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
        work = torch.float32 if dy_MN.dtype == torch.float16 else dy_MN.dtype
        for outputs, w_Kn in _pieces(ctx.weight, work):
            dx_MK += dy_MN[:, outputs].to(work) @ w_Kn.t()
        return dx_MK.to(dy_MN.dtype), None


def scaled_rows(
    x_codes_MK: Tensor,
    x_scales: Tensor,
    weight: ScaledWeight,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    *,
    last: bool = False,
) -> Tensor:
    """The product of codes with its scales and bias, in fp32, for a result in `dtype`; `last`: it may be in that."""
    codes_NK, scales, num_features = weight.codes, weight.scales, weight.num_features
    stored = torch.bfloat16 if last and dtype == torch.bfloat16 else torch.float32
    if weight.kind == torch.int8:
        if not weight.packed and len(x_codes_MK) >= byte_tiles.FEWEST_ROWS and byte_tiles.fits(codes_NK):
            return byte_tiles.multiply_rows(x_codes_MK, x_scales, codes_NK, scales, bias_N, stored)
        if not weight.packed and _by_loops(x_codes_MK, codes_NK):
            x_scales_M = x_scales.flatten().expand(len(x_codes_MK))
            return compiled_codes_matvec(x_codes_MK, x_scales_M, codes_NK, scales.expand(num_features), bias_N, stored)
        sums_MN = int8_product(x_codes_MK, codes_NK, num_features, packed=weight.packed)
        y_MN = sums_MN.mul_(x_scales.view(-1, 1)).mul_(scales)
    else:
        path = float8_path(len(x_codes_MK), weight)
        return float8_product(path, _numbers(x_codes_MK), x_scales, weight, bias_N, dtype, last=last)
    return y_MN if bias_N is None else y_MN + bias_N.float()


def float8_path(num_rows: int, weight: ScaledWeight) -> str:
    """Of `FLOAT8_PATHS` the one that multiplies so many rows by a weight of float8."""
    if weight.codes.dtype != torch.float8_e4m3fn or torch.compiler.is_compiling() or not num_rows:
        return "torch"
    kind = "float8 in blocks by float8" if weight.blocked else "float8 by float8"
    fits = float_rows.fits_panels(weight.num_features, weight.width)
    return choose(kind, num_rows, FLOAT8_PATHS if fits else ("loops", "pieces"))


def float8_product(
    path: str,
    x_MK: Tensor,
    x_scales: Tensor,
    weight: ScaledWeight,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    *,
    last: bool = False,
) -> Tensor:
    """`scaled_rows` of float8 numbers in bf16, by a path."""
    codes_NK, scales, num_features = weight.codes, weight.scales, weight.num_features
    stored = torch.bfloat16 if last and dtype == torch.bfloat16 else torch.float32
    if path == "panels":
        return float_rows.float8_panels(x_MK, x_scales, codes_NK, scales, weight.spread, bias_N, stored)
    if path == "loops":
        y_MN = float_rows.float8_matvec(x_MK, x_scales, codes_NK, scales, weight.spread)
    elif weight.blocked:
        y_MN = _blocked_rows(x_MK, x_scales, weight, dtype)
    else:
        y_MN = _float8_rows(x_MK, weight, dtype)
        if y_MN.dtype == stored == torch.bfloat16 and can_quantize(y_MN):
            return scaled(y_MN, x_scales.flatten().expand(len(y_MN)), scales.expand(num_features), bias_N)
        y_MN = y_MN.float().mul_(x_scales.view(-1, 1)).mul_(scales)
    if bias_N is not None:
        return y_MN.float() + bias_N.float()
    return y_MN if last else y_MN.float()


def _float8_rows(x_MK: Tensor, weight: ScaledWeight, dtype: torch.dtype) -> Tensor:
    """Sums of codes as bf16 numbers, without scales; for results in bf16 in that."""
    codes_NK, work = weight.codes, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if codes_NK.dtype != torch.float8_e4m3fn or torch.compiler.is_compiling():
        w_NK = to_bfloat16(codes_NK) if codes_NK.dtype == torch.float8_e4m3fn else codes_NK
        return F.linear(x_MK.to(work), w_NK.to(work))
    return _linear_in_pieces(x_MK.to(work), weight.num_features, float_rows.e4m3_pieces(codes_NK))


def _blocked_rows(x_MK: Tensor, x_scales: Tensor, weight: ScaledWeight, dtype: torch.dtype) -> Tensor:
    """The product with its scales of blocks; for results in bf16 both sides are scaled and rounded to it before."""
    codes_NK, scales, spread = weight.codes, weight.scales, weight.spread
    coded = codes_NK.dtype == torch.float8_e4m3fn
    if coded and torch.compiler.is_compiling():
        codes_NK, coded = to_bfloat16(codes_NK), False
    if not coded:
        return _by_blocks(x_MK, x_scales, codes_NK, scales, spread)
    if dtype != torch.bfloat16:
        pieces = float_rows.e4m3_pieces(codes_NK)
        return torch.cat([_by_blocks(x_MK, x_scales, w_nK, scales, spread, rows.start) for rows, w_nK in pieces], dim=1)
    rows_MK = scaled_numbers(x_MK, x_scales, BLOCK)
    return _linear_in_pieces(rows_MK, weight.num_features, float_rows.e4m3_pieces(codes_NK, scales, spread))


def _linear_in_pieces(x_MK: Tensor, num_features: int, pieces: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """x w^T in the dtype of x, of some outputs after the other."""
    y_MN = x_MK.new_empty(len(x_MK), 0)
    for outputs, w_nK in pieces:
        y_Mn = F.linear(x_MK, w_nK.to(x_MK.dtype))
        if y_Mn.shape[1] == num_features:
            return y_Mn
        y_MN = y_MN if outputs.start else x_MK.new_empty(len(x_MK), num_features)
        y_MN[:, outputs] = y_Mn
    return y_MN


def _by_blocks(x_MK: Tensor, x_scales: Tensor, w_nK: Tensor, scales: Tensor, spread: int, begin: int = 0) -> Tensor:
    """The products of blocks of 128 inputs, each times its scales, in fp32; `begin`: the first output."""
    y_Mn, lines_n = torch.zeros(len(x_MK), len(w_nK)), torch.arange(begin, begin + len(w_nK)) // spread
    for block, first in enumerate(range(0, x_MK.shape[1], BLOCK)):
        part = slice(first, first + BLOCK)
        sums_Mn = F.linear(x_MK[:, part].float(), w_nK[:, part].float())
        y_Mn += sums_Mn.mul_(x_scales[:, block, None]).mul_(scales[lines_n, block])
    return y_Mn


def _by_loops(x_MK: Tensor, codes_NK: Tensor) -> bool:
    """Whether compiled loops multiply codes by codes."""
    (M, K), traced = x_MK.shape, torch.compiler.is_compiling()
    usable = K >= SHORTEST and 0 not in (M, len(codes_NK)) and not traced
    return usable and choose("int8 by int8", M, ("loops", "torch")) == "loops"


def _numbers(x_codes_MK: Tensor) -> Tensor:
    """float8 codes as bf16 numbers, if they are not (`quantize.float8_rows`)."""
    return x_codes_MK if x_codes_MK.dtype == torch.bfloat16 else to_bfloat16(x_codes_MK)
