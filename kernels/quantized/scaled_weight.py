"""Weights of 8-bit codes for products with 8-bit activations: int8 or float8 (e4m3), with scales in fp32.

    one for each feature   [N]                             w[n, k] = q[n, k] s[n]
    one for all            [1]                             w[n, k] = q[n, k] s[0]
    one for each block     [ceil(N / 128), ceil(K / 128)]  w[n, k] = q[n, k] s[n // 128, k // 128]    (float8 only)

Joined weights of blocks have as many outputs in a block as divide all of them (`spread`), 128 at most.

Codes lie as [N, K], which is how tensor cores want both operands, and a CPU's compiled loops. Where a CPU has no loops
for float8, or a code is NaN, they are kept as bf16 numbers (`kernels/cpu/float_rows.py`), and int8 codes without Numba
in the layout of the product that multiplies them (`cpu_int8.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trine.kernels.cpu.compiled import available
from trine.kernels.cpu.float8 import to_bfloat16
from trine.kernels.cpu.float_rows import keeps_codes
from trine.kernels.launch import ceil_div
from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.cpu_int8 import kept_int8, plain_int8
from trine.kernels.target import on_device, uses_triton

KINDS = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class ScaledWeight:
    """A weight made by `scaled_weight`. `kind` is the dtype of its codes, whatever they are kept in.

    `packed`: they are in oneDNN's layout. `spread`: outputs of a block, 1 where scales are not of blocks.
    """

    codes: Tensor
    scales: Tensor
    kind: torch.dtype
    num_features: int
    width: int
    packed: bool
    spread: int = 1

    @property
    def blocked(self) -> bool:
        return self.scales.dim() == 2

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: torch.device | str) -> ScaledWeight:
        """On another device, as that device keeps it."""
        if on_device(self.device, device):
            return self
        return scaled_weight(self.plain_codes().to(device), self.scales.to(device))

    def plain_codes(self) -> Tensor:
        """The codes [N, K] in `kind`, as `scaled_weight` got them."""
        return plain_int8(self.codes, self.num_features, self.width) if self.packed else self.codes.to(self.kind)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """w_NK in `dtype`: q s in fp32 (float64 in float64), then rounded."""
        work = torch.promote_types(dtype, torch.float32)
        scales, codes_NK = self.scales.to(work), self.plain_codes().to(work)
        if self.blocked:
            lines = scales.repeat_interleave(self.spread, 0)[: self.num_features]
            return (codes_NK * lines.repeat_interleave(BLOCK, 1)[:, : self.width]).to(dtype)
        return (codes_NK * scales[:, None]).to(dtype)


def can_join(weights: Sequence[ScaledWeight]) -> bool:
    """Whether `join` takes them: plain codes of one kind, as wide, with scales of blocks or with others."""
    kinds = {(one.kind, one.width, one.blocked) for one in weights}
    return len(kinds) == 1 and not any(one.packed for one in weights)


def join(weights: Sequence[ScaledWeight]) -> tuple[ScaledWeight, list[ScaledWeight]]:
    """The outputs of several weights as those of one, and the weights again, which then share its memory."""
    assert can_join(weights)
    rows = [one.num_features for one in weights]
    codes = torch.cat([one.codes for one in weights])
    if weights[0].blocked:
        spread = math.gcd(*(one.spread for one in weights), *rows[:-1])
        lines = [
            one.scales.repeat_interleave(one.spread // spread, 0)[: ceil_div(one.num_features, spread)]
            for one in weights
        ]
        whole = replace(weights[0], codes=codes, scales=torch.cat(lines), num_features=sum(rows), spread=spread)
        return whole, [replace(one, codes=part) for one, part in zip(weights, codes.split(rows), strict=True)]
    scales = torch.cat([one.scales.expand(count) for one, count in zip(weights, rows, strict=True)])
    parts = zip(weights, codes.split(rows), scales.split(rows), strict=True)
    return (
        replace(weights[0], codes=codes, scales=scales, num_features=sum(rows)),
        [replace(one, codes=part, scales=of_part) for one, part, of_part in parts],
    )


def _aligned(codes_NK: Tensor) -> Tensor:
    """Contiguous, from where a line of the cache begins: a CPU's matrix tiles load rows that cross lines slowly."""
    kept = codes_NK.contiguous()
    return kept if kept.data_ptr() % 64 == 0 else kept.clone()


def scaled_weight(codes_NK: Tensor, scales: Tensor) -> ScaledWeight:
    """The weight of codes [N, K] in int8 or float8_e4m3fn; scales of any float dtype, [N] or [N, 1], [1] or blocks.

    int8 has no scales of blocks. Raises ValueError for another dtype or shape.
    """
    if codes_NK.dim() != 2 or codes_NK.dtype not in KINDS or 0 in codes_NK.shape[1:]:
        raise ValueError(
            f"codes are {codes_NK.dtype} {tuple(codes_NK.shape)}; expected int8 or float8_e4m3fn [N, K], K positive"
        )
    num_features, width = codes_NK.shape
    blocks = (ceil_div(num_features, BLOCK), ceil_div(width, BLOCK))
    shape = tuple(scales.shape)
    allowed: list[tuple[int, ...]] = [(num_features,), (num_features, 1), (1,), ()]
    if codes_NK.dtype == torch.float8_e4m3fn:
        allowed.append(blocks)
    if not scales.is_floating_point() or shape not in allowed:
        raise ValueError(
            f"scales are {scales.dtype} {shape} for {codes_NK.dtype} {tuple(codes_NK.shape)}; expected floating point "
            f"in one of the shapes {', '.join(map(str, allowed))}"
        )
    blocked = shape == blocks and shape != (num_features, 1) and codes_NK.dtype != torch.int8
    scales = scales.float().contiguous() if blocked else scales.float().reshape(-1)
    tiles = uses_triton(codes_NK) or codes_NK.is_meta
    packed = False
    if tiles:
        kept = codes_NK.contiguous()
    elif codes_NK.dtype == torch.int8:
        kept, packed = (_aligned(codes_NK), False) if available() else kept_int8(codes_NK)
    else:
        kept = codes_NK.contiguous() if keeps_codes(codes_NK) else to_bfloat16(codes_NK)
    return ScaledWeight(kept, scales, codes_NK.dtype, num_features, width, packed, BLOCK if blocked else 1)
