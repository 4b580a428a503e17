"""Products of many rows of int8 with plain int8 weights in matrix tiles, where a CPU has them (`byte_tiles_loops.py`).

torch's product of the plain weight is no faster per row than one in bf16.

Shapes: M rows, K inputs, N outputs. Exact: sums are whole numbers, rounded once to fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.codes import has_tiles, tile_shapes
from trine.kernels.cpu.compiled import array, available, use_torch_threads

# Rows from which on this is faster than torch's product, and what rows of x and outputs are counted in.
FEWEST_ROWS = 256
_ROWS, _DEPTH, _OUTPUTS = 16, 64, 32


def fits(codes_NK: Tensor) -> bool:
    """Whether `multiply_rows` takes this weight, here."""
    (N, K), plain = codes_NK.shape, codes_NK.device.type == "cpu" and codes_NK.is_contiguous()
    whole = N % _OUTPUTS == 0 and K % _DEPTH == 0 and N > 0
    usable = plain and whole and not torch.compiler.is_compiling() and available()
    return usable and has_tiles()


def multiply_rows(x_MK: Tensor, codes_NK: Tensor) -> Tensor:
    """x codes^T in fp32 of int8 numbers; shapes as `fits` wants them."""
    from trine.kernels.cpu.byte_tiles_loops import multiply_bytes

    use_torch_threads()
    M, K = x_MK.shape
    filled = F.pad(x_MK, (0, 0, 0, -M % (2 * _ROWS)))
    # Tile, block of K, four of K, row: as int32, for whole fours move.
    fours = filled.contiguous().view(torch.int32).view(-1, _ROWS, K // _DEPTH, _DEPTH // 4)
    laid = fours.permute(0, 2, 3, 1).contiguous()
    y_MN = torch.empty(M, len(codes_NK))
    multiply_bytes(array(codes_NK).reshape(-1), K, array(laid.view(torch.int8)).reshape(-1), tile_shapes(), array(y_MN))
    return y_MN
