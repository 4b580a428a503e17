"""One quantized weight as plain tensors: what methods make, formats store, and layers are built from.

    w[n, k] = (q[n, k] - z[g]) s[g]        g the group, row or block of (n, k); no z where the scheme is symmetric

Groups hold neighbouring columns. Where a format puts columns into groups in another order (GPTQ's activation order),
the codes are kept in the order of the groups, and `order_K` says which input each of these columns multiplies.

Shapes: N output features, K input features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.engine.errors import CheckpointError
from trine.engine.model.quantized.scheme import BLOCK, Scheme
from trine.kernels.quantized.op import Weight
from trine.kernels.quantized.packing import pack
from trine.kernels.quantized.scaled_weight import scaled_weight


@dataclass(frozen=True)
class QuantizedTensor:
    """`codes_NK` int8 or float8_e4m3fn; `scales` of any float dtype, [N, G], or [N / 128, K / 128] rounded up for
    blocks; `zeros_NG` int8 or None. `order_K` int64 or None: column j of the codes is for input `order_K[j]`.
    """

    scheme: Scheme
    codes_NK: Tensor
    scales: Tensor
    zeros_NG: Tensor | None = None
    order_K: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes on disk, codes of 4 bits packed."""
        num_features, width = self.codes_NK.shape
        zeros = 0 if self.zeros_NG is None else self.zeros_NG.numel() * self.scheme.bits // 8
        return num_features * width * self.scheme.bits // 8 + self.scales.nbytes + zeros

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """w_NK: computed in fp32 (float64 in float64), rounded once."""
        work = torch.promote_types(dtype, torch.float32)
        groups = to_groups(self.codes_NK.to(work), self.scheme)
        if self.zeros_NG is not None:
            groups = groups - self.zeros_NG.to(work)[..., None]
        w_NK = from_groups(groups * self.scales.to(work)[..., None], self.scheme, *self.codes_NK.shape).to(dtype)
        return w_NK if self.order_K is None else w_NK[:, self.order_K.argsort()]

    def weight(self) -> Weight:
        """As the kernels want it, on the device of the codes; its inputs in the order of the codes."""
        if self.scheme.activations == "none":
            return pack(self.codes_NK, self.scales, self.zeros_NG, bits=self.scheme.bits)
        return scaled_weight(self.codes_NK, self.scales)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        zeros, order = (None if one is None else one.to(device) for one in (self.zeros_NG, self.order_K))
        return QuantizedTensor(self.scheme, self.codes_NK.to(device), self.scales.to(device), zeros, order)

    def in_groups(self, size: int) -> QuantizedTensor:
        """The same numbers with a scale for each `size` columns, which must divide its groups or rows."""
        copies = (self.scheme.group_size or self.codes_NK.shape[1]) // size
        scales, zeros = (
            None if one is None else one.repeat_interleave(copies, 1) for one in (self.scales, self.zeros_NG)
        )
        assert scales is not None
        return replace(self, scheme=self.scheme.with_groups(size), scales=scales, zeros_NG=zeros)

    def split(self, name: str, parts: Sequence[Tensor]) -> list[QuantizedTensor]:
        """Several weights, each of the outputs with these numbers. Raises `CheckpointError` where that cuts a block."""
        return [self] if len(parts) == 1 else [self.outputs(name, rows) for rows in parts]

    def outputs(self, name: str, rows: Tensor) -> QuantizedTensor:
        """The weight of the outputs with these numbers. Raises `CheckpointError` where that cuts a block."""
        of_scales = rows
        if self.scheme.strategy == "block":
            first, count = int(rows[0]), len(rows)
            whole = first % BLOCK == 0 and (count % BLOCK == 0 or first + count == len(self.codes_NK))
            if not whole or not torch.equal(rows, torch.arange(first, first + count)):
                raise CheckpointError(f"{name} joins layers whose outputs its blocks of {BLOCK} do not keep apart")
            of_scales = rows[::BLOCK] // BLOCK
        codes_NK = self.codes_NK.view(torch.int8)[rows].view(self.codes_NK.dtype)
        zeros_NG = None if self.zeros_NG is None else self.zeros_NG[rows]
        return replace(self, codes_NK=codes_NK, scales=self.scales[of_scales], zeros_NG=zeros_NG)


def to_groups(x_NK: Tensor, scheme: Scheme) -> Tensor:
    """The numbers that share a scale, side by side: [rows of scales, columns of scales, size]; blocks filled with 0."""
    num_features, width = x_NK.shape
    if scheme.strategy != "block":
        return x_NK.reshape(num_features, -1, scheme.group_size or width)
    padded = F.pad(x_NK, (0, -width % BLOCK, 0, -num_features % BLOCK))
    blocks = padded.view(-(-num_features // BLOCK), BLOCK, -(-width // BLOCK), BLOCK)
    return blocks.transpose(1, 2).flatten(2)


def from_groups(groups: Tensor, scheme: Scheme, num_features: int, width: int) -> Tensor:
    """[N, K] again."""
    if scheme.strategy != "block":
        return groups.reshape(num_features, width)
    padded = groups.view(*groups.shape[:2], BLOCK, BLOCK).transpose(1, 2).flatten(2).flatten(0, 1)
    return padded[:num_features, :width].contiguous()
