"""float8 (e4m3) and MXFP4 (e2m1) weights of one expert on a CPU, and the linear layer with quantized weights there.

The bits of a code, moved to where fp16 has sign, exponent and fraction, are its number over a power of two, 2^8 for
e4m3 and 2^14 for e2m1, subnormal codes included; the scale makes it right. e2m1 comes two at a time from a table of
bytes. Everything else happens in fp32, for torch multiplies a half by fp32 scales 20 times slower than fp32 by fp32.
So by torch; compiled loops (`cpu/float_codes_loops.py`) give the same bits in a fraction of the time. Few rows are
multiplied by the codes themselves (`cpu/float_rows.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import float_rows
from trine.kernels.cpu.compiled import array, available, use_torch_threads
from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.cpu import weight_only_rows
from trine.kernels.quantized.packing import PackedWeight

_SHIFT = {"fp8": 2.0**8, "mxfp4": 2.0**14}
# Numbers dequantized at a time: 8 MiB in fp32 by torch, whose calls with fewer cost more than the cache saves; by
# compiled loops 1 MiB, which the second cache holds until the product has read it.
_PIECE_NUMBERS, _COMPILED_PIECE_NUMBERS = 2**21, 2**18


@dataclass(frozen=True)
class FloatRows:
    """Codes int8 [N, K] of fp8, or [N, K / 2] of mxfp4 (even k in the low half).

    `scales`: fp32 [N, 1] or with a `spread` of 128 [ceil(N / 128), ceil(K / 128)]; mxfp4 the bytes [N, K / 32].
    """

    codes: Tensor
    scales: Tensor
    kind: str
    spread: int

    @property
    def num_features(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        return self.codes.shape[1] * (2 if self.kind == "mxfp4" else 1)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype, rows: slice) -> Tensor:
        """Some rows of w_NK in `dtype`: the exact code times its scale in fp32, rounded once."""
        codes = self.codes[rows]
        if _is_compiled():
            return self._by_loops(codes, dtype, rows)
        if self.kind == "mxfp4":
            numbers = _from_e2m1(codes).view(len(codes), -1, 32)
            scaled = self._times(numbers, from_e8m0(self.scales[rows])[:, :, None])
            return scaled.view(len(codes), self.width).to(dtype)
        scales = self.scales
        if self.spread > 1:
            lines = torch.arange(self.num_features)[rows] // BLOCK
            scales = scales[lines].repeat_interleave(BLOCK, 1)[:, : self.width]
        else:
            scales = scales[rows]
        return self._times(_from_e4m3(codes), scales).to(dtype)

    def _by_loops(self, codes: Tensor, dtype: torch.dtype, rows: slice) -> Tensor:
        from trine.kernels.cpu.float_codes_loops import dequantize_e2m1, dequantize_e4m3

        use_torch_threads()
        w_NK = torch.empty(len(codes), self.width)
        bytes_of, w = array(codes.contiguous().view(torch.uint8).view(-1)), array(w_NK.view(-1))
        if self.kind == "mxfp4":
            dequantize_e2m1(bytes_of, array(from_e8m0(self.scales[rows])), w)
        else:
            first, block = rows.indices(self.num_features)[0], BLOCK if self.spread > 1 else self.width
            dequantize_e4m3(bytes_of, array(self.scales), first, self.spread, block, self.width, w)
        return w_NK.to(dtype)

    def multiply(self, x_MK: Tensor) -> Tensor:
        """x w^T in fp32 by loops that decode in registers (where `float_rows.multiplies`)."""
        if self.kind == "mxfp4":
            return float_rows.e2m1_matvec(x_MK, self.codes, self.scales)
        return float_rows.e4m3_matvec(x_MK, self.codes, self.scales, self.spread)

    def _times(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """fp32 numbers times the power of two that they miss and their scales."""
        shifted = scales * _SHIFT[self.kind]
        if not bool(shifted.isfinite().all()):
            return numbers.mul_(_SHIFT[self.kind]).mul_(scales)
        return numbers.mul_(shifted)


def _is_compiled() -> bool:
    return not torch.compiler.is_compiling() and available()


def from_e8m0(scales: Tensor) -> Tensor:
    """2^(s - 127) in fp32 from bytes below 255; that of 0 is a subnormal number."""
    bits = scales.to(torch.int32) << 23
    return torch.where(bits == 0, 0x00400000, bits).to(torch.int32).view(torch.float32)


def _from_e4m3(codes: Tensor) -> Tensor:
    """fp32, over 2^8, from codes in int8: seven bits up, where the sign stands twice, and its second place cleared."""
    return codes.to(torch.int16).mul_(128).bitwise_and_(~0x4000).view(torch.float16).float()


def _from_e2m1(codes: Tensor) -> Tensor:
    """fp32 [n, K], over 2^14, from int8 [n, K / 2]."""
    words = _pairs_of_e2m1().index_select(0, codes.reshape(-1).view(torch.uint8).to(torch.int32))
    return words.view(torch.float16).float()


@lru_cache(maxsize=1)
def _pairs_of_e2m1() -> Tensor:
    """For each byte two fp16 patterns in one int32, the low half's code first."""
    codes = torch.arange(256, dtype=torch.int32)
    low = (codes & 7) << 9 | (codes & 8) << 12
    return low | (codes & 0x70) << 21 | (codes & 0x80) << 24


def linear_rows(x_MK: Tensor, weight: PackedWeight | FloatRows, bias_N: Tensor | None) -> Tensor:
    """x w^T + bias in the dtype of x: few rows by the codes, more by rows of the weight dequantized some at a time."""
    if isinstance(weight, PackedWeight):
        return weight_only_rows(x_MK, weight, bias_N)
    if float_rows.multiplies(len(x_MK), weight.width):
        y_MN = weight.multiply(x_MK)
        return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(x_MK.dtype)
    y_MN = x_MK.new_empty(len(x_MK), weight.num_features)
    bias_N = None if bias_N is None else bias_N.to(x_MK.dtype)
    step = max(1, (_COMPILED_PIECE_NUMBERS if _is_compiled() else _PIECE_NUMBERS) // weight.width)
    for first in range(0, weight.num_features, step):
        rows = slice(first, first + step)
        y_MN[:, rows] = F.linear(x_MK, weight.dequantize(x_MK.dtype, rows), None if bias_N is None else bias_N[rows])
    return y_MN
