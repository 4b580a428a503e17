"""float8 (e4m3) and MXFP4 (e2m1) weights of one expert on a CPU, and the linear layer with quantized weights there.

The bits of a code, moved to where bf16 has sign, exponent and fraction, are its number over a power of two, 2^120 for
e4m3 and 2^126 for e2m1, subnormal codes included. One product makes it right, which is faster than torch's own
conversion of float8 by ten times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.cpu import _piece_rows as piece_rows
from trine.kernels.quantized.cpu import weight_only_rows
from trine.kernels.quantized.packing import PackedWeight

_SIGN = -(2**15)


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
        codes = self.codes[rows].to(torch.int16)
        if self.kind == "mxfp4":
            pairs = torch.stack((_from_e2m1(codes << 12), _from_e2m1(codes << 8)), dim=-1).flatten(1)
            groups = pairs.view(len(codes), -1, 32)
            return _scaled(groups, from_e8m0(self.scales[rows])[:, :, None], dtype).view(len(codes), -1)
        values = _from_e4m3(codes)
        scales = self.scales
        if self.spread > 1:
            last = rows.stop if rows.stop is not None else self.num_features
            lines = torch.arange(rows.start or 0, min(last, self.num_features)) // BLOCK
            return _scaled(values, scales[lines].repeat_interleave(BLOCK, 1)[:, : self.width], dtype)
        return _scaled(values, scales[rows], dtype)


def _scaled(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    return torch.mul(values, scales.float(), out=out)


def from_e8m0(scales: Tensor) -> Tensor:
    """2^(s - 127) in fp32 from bytes below 255; that of 0 is a subnormal number."""
    bits = scales.to(torch.int32) << 23
    return torch.where(bits == 0, 0x00400000, bits).to(torch.int32).view(torch.float32)


def _from_e4m3(codes: Tensor) -> Tensor:
    """bf16 from codes as int16."""
    return ((codes & 0x7F) << 4 | codes & _SIGN).view(torch.bfloat16) * 2.0**120


def _from_e2m1(codes: Tensor) -> Tensor:
    """bf16 from int16 with the code in the four highest bits."""
    return ((codes >> 6) & 0x1C0 | codes & _SIGN).view(torch.bfloat16) * 2.0**126


def linear_rows(x_MK: Tensor, weight: PackedWeight | FloatRows, bias_N: Tensor | None) -> Tensor:
    """x w^T + bias in the dtype of x: piece by piece, each dequantized into what fits a cache."""
    if isinstance(weight, PackedWeight):
        return weight_only_rows(x_MK, weight, bias_N)
    y_MN = x_MK.new_empty(len(x_MK), weight.num_features)
    bias_N = None if bias_N is None else bias_N.to(x_MK.dtype)
    # Whole blocks of scales.
    step = max(1, piece_rows(weight.width) // BLOCK) * BLOCK
    for first in range(0, weight.num_features, step):
        rows = slice(first, first + step)
        y_MN[:, rows] = F.linear(x_MK, weight.dequantize(x_MK.dtype, rows), None if bias_N is None else bias_N[rows])
    return y_MN
