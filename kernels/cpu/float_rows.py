"""Few rows times a weight of float8 (e4m3) or MXFP4 (e2m1) codes on a CPU: y = x w^T, the codes read once.

Compiled loops (`float_rows_loops.py`) where the CPU has vectors of 512 bits. Decoding the codes to numbers and
multiplying those takes as long for one row as for a few, and overtakes the loops between 16 and 32 rows.

Shapes: M rows, K inputs, N outputs. Bytes: N K b for codes of b bytes, and the scales.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.compiled import array, available, use_torch_threads

MOST_ROWS = 16
# Inputs that are read together: of MXFP4 those that share a scale.
BLOCK = 32


def multiplies(num_rows: int, width: int) -> bool:
    """Whether the loops take these rows here."""
    return 0 < num_rows <= MOST_ROWS and width >= BLOCK and not torch.compiler.is_compiling() and _has_loops()


@lru_cache(maxsize=1)
def _has_loops() -> bool:
    if not available():
        return False
    from trine.kernels.cpu.float_rows_loops import has_instructions

    return has_instructions()


def e4m3_matvec(x_MK: Tensor, codes_NK: Tensor, scales: Tensor, spread: int) -> Tensor:
    """x w^T in fp32 of codes that are not NaN, as bytes, with fp32 scales.

    Those are [N, 1], or with a `spread` of 128 [ceil(N / 128), ceil(K / 128)].
    """
    from trine.kernels.cpu.float_rows_loops import multiply_e4m3

    rows = _rows(x_MK)
    y_MN = torch.empty(len(rows), len(codes_NK))
    use_torch_threads()
    multiply_e4m3(array(codes_NK.view(torch.uint8)), array(scales.contiguous()), spread, array(rows), array(y_MN))
    return y_MN[: len(x_MK)]


def e2m1_matvec(x_MK: Tensor, codes_NH: Tensor, scales_NG: Tensor) -> Tensor:
    """x w^T in fp32 of two codes a byte (even k in the low half), with a byte e8m0 for each 32 numbers."""
    from trine.kernels.cpu.float_rows_loops import multiply_e2m1

    rows = _rows(x_MK)
    even_odd = rows.unflatten(1, (-1, BLOCK // 2, 2)).transpose(2, 3).reshape(rows.shape)
    y_MN = torch.empty(len(rows), len(codes_NH))
    use_torch_threads()
    multiply_e2m1(array(codes_NH.view(torch.uint8)), array(scales_NG), array(even_odd), array(y_MN))
    return y_MN[: len(x_MK)]


def _rows(x_MK: Tensor) -> Tensor:
    """In fp32. Four rows take little longer than one, so three are filled up with one of zeros."""
    x_MK = x_MK.float().contiguous()
    return F.pad(x_MK, (0, 0, 0, 1)) if len(x_MK) % 4 == 3 else x_MK
