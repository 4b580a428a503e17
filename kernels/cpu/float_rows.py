"""Rows times a weight of float8 (e4m3) or MXFP4 (e2m1) codes on a CPU: y = x w^T.

Few rows by compiled loops that read the codes once, where the CPU has vectors of 512 bits: rows of any numbers
(`float_rows_loops.py`), and rows of float8 numbers with scales (`float8_loops.py`). More rows by numbers that the codes
are decoded to before: a panel of outputs at a time in loops (`float8_panels_loops.py`), or some outputs for torch's
product, so that the cache holds them. That takes as long for one row as for many. Of experts, whose numbers are scaled
in fp32 before they are multiplied, it overtakes the loops behind 16 rows.

Shapes: M rows, K inputs, N outputs, G groups. Bytes: N K b for codes of b bytes, and the scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.compiled import address, array, available, single, use_torch_threads
from trine.kernels.cpu.float8 import has_nan
from trine.kernels.cpu.projection import SHORTEST

MOST_ROWS = 16
# Numbers of a weight that are decoded at a time: 8 MiB of bf16.
_PIECE_NUMBERS = 2**22
# Pieces of work for a thread.
_PIECES = 4
# Inputs that are read together: of MXFP4 those that share a scale.
BLOCK = 32


def multiplies(num_rows: int, width: int) -> bool:
    """Whether the loops take these rows of any numbers here."""
    return 0 < num_rows <= MOST_ROWS and width >= BLOCK and not torch.compiler.is_compiling() and _has_loops()


@lru_cache(maxsize=1)
def _has_loops() -> bool:
    if not available():
        return False
    from trine.kernels.cpu.float_rows_loops import has_instructions

    return has_instructions()


def keeps_codes(codes_NK: Tensor) -> bool:
    """Whether a float8 weight [N, K] of a CPU can be kept as codes: the loops take it, and no code is NaN."""
    kept = codes_NK.shape[1] >= SHORTEST and len(codes_NK) > 0 and _has_loops()
    return kept and not has_nan(codes_NK.view(torch.int8))


def e4m3_pieces(codes_NK: Tensor, scales: Tensor | None = None, spread: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Some outputs after the other as bf16 numbers [n, K], in a buffer that the next piece overwrites.

    With scales of blocks, [ceil(N / spread), ceil(K / 128)], times those, rounded once.
    """
    from trine.kernels.cpu.float8_loops import decode_e4m3

    N, K = codes_NK.shape
    step, codes = max(1, _PIECE_NUMBERS // K), codes_NK.view(torch.uint8)
    buffer, of_blocks = (
        torch.empty(min(step, N), K, dtype=torch.bfloat16),
        torch.empty(0, 0) if scales is None else scales,
    )
    use_torch_threads()
    for first in range(0, N, step):
        outputs = slice(first, min(first + step, N))
        piece = buffer[: outputs.stop - first]
        decode_e4m3(array(codes[outputs]), array(of_blocks), first, spread, array(piece))
        yield outputs, piece


def float8_matvec(x_MK: Tensor, x_scales: Tensor, codes_NK: Tensor, scales: Tensor, spread: int) -> Tensor:
    """x w^T with its scales in fp32, of float8 numbers in bf16 and codes that are not NaN, 64 inputs at least.

    `scales` fp32: [N] or [1] and `spread` 1, `x_scales` [M, 1] or [1]; or [ceil(N / spread), G] and [M, G], one for 128
    inputs.
    """
    from trine.kernels.cpu.float8_loops import multiply_float8

    M, N = len(x_MK), len(codes_NK)
    lines, y_MN = scales if scales.dim() == 2 else scales.expand(N)[:, None], torch.empty(M, N)
    factors_MG = x_scales.expand(M)[:, None] if x_scales.dim() == 1 else x_scales
    codes, size = array(codes_NK.view(torch.uint8)), -(-N // (_PIECES * use_torch_threads()))
    multiply_float8(codes, single(lines), spread, array(x_MK.contiguous()), single(factors_MG), size, array(y_MN))
    return y_MN


def fits_panels(num_features: int, width: int) -> bool:
    """Whether `float8_panels` takes a weight of codes that are kept (`table.choose` says where it is fast)."""
    from trine.kernels.cpu.float8_panels_loops import PANEL

    return num_features >= PANEL and width % 2 == 0


def float8_panels(
    x_MK: Tensor,
    x_scales: Tensor,
    codes_NK: Tensor,
    scales: Tensor,
    spread: int,
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x w^T + bias in bf16 or fp32, of what `float8_matvec` takes (where `table.multiplies_bfloats`)."""
    from trine.kernels.cpu.float8_panels_loops import multiply_float8_panels

    (M, _), N, bias = x_MK.shape, len(codes_NK), single(bias_N)
    lines = scales if scales.dim() == 2 else scales.expand(N)[:, None]
    factors_MG = x_scales.expand(M)[:, None] if x_scales.dim() == 1 else x_scales
    x_MK, y_MN = x_MK.contiguous(), torch.empty(M, N, dtype=dtype)
    use_torch_threads()
    multiply_float8_panels(
        array(codes_NK.view(torch.uint8)), single(lines), spread, x_MK.data_ptr(),
        single(factors_MG), address(bias), y_MN.data_ptr(), dtype == torch.bfloat16,
    )  # fmt: skip
    return y_MN


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
