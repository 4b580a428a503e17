"""Products of rows of int8 with plain int8 weights in matrix tiles, where a CPU has them (`byte_tiles_loops.py`).

Shapes: M rows, K inputs, N outputs. Sums are exact whole numbers, rounded once to fp32 and scaled there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.codes import has_tiles, tile_shapes
from trine.kernels.cpu.compiled import array, available, single, use_torch_threads

# Rows from which on this is faster than torch's product, which then is to be scaled and rounded.
FEWEST_ROWS = 32
# What rows of x, numbers of K and outputs are counted in.
_ROWS, _DEPTH, _OUTPUTS = 32, 64, 32


def fits(codes_NK: Tensor) -> bool:
    """Whether `multiply_rows` takes this weight, here."""
    (N, K), plain = codes_NK.shape, codes_NK.device.type == "cpu" and codes_NK.is_contiguous()
    whole = N % _OUTPUTS == 0 and K % _DEPTH == 0 and N > 0 and K > 0
    usable = plain and whole and not torch.compiler.is_compiling() and available()
    return usable and has_tiles()


def multiply_rows(
    x_MK: Tensor, x_scales: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x codes^T) x_scales scales + bias, in fp32 and rounded once to bf16 or fp32, of int8 numbers x and codes.

    Scales [M, 1] or [1] of rows, [N] or [1] of outputs; shapes as `fits` wants them.
    """
    from trine.kernels.cpu.byte_tiles_loops import lay_fours, multiply_bytes

    use_torch_threads()
    (M, K), N = x_MK.shape, len(codes_NK)
    filled = F.pad(x_MK, (0, 0, 0, -M % _ROWS)).contiguous()
    laid, y_MN = torch.empty_like(filled), torch.empty(len(filled), N, dtype=dtype)
    lay_fours(array(filled).reshape(-1), K, array(laid).reshape(-1))
    bias = torch.zeros(N) if bias_N is None else bias_N
    factors = (F.pad(x_scales.float().flatten().expand(M), (0, -M % _ROWS)), scales.float().expand(N), bias)
    multiply_bytes(
        array(codes_NK).reshape(-1), K, array(laid).reshape(-1), tile_shapes(), tuple(map(single, factors)), array(y_MN)
    )
    return y_MN[:M]
