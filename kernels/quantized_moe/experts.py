"""The quantized weights of all experts of a layer, in the layout that the kernels read, made once at load.

    int4, int8   w = (q - z) s     one scale and zero point for a row or for 32, 64 or 128 numbers of it (W4A16, W8A16)
    fp8          w = q s           q float8 e4m3; one scale for an expert, for a row or for a block of 128 x 128
    mxfp4        w = q 2^(s - 127)    q of e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; a byte s for 32 numbers

For GPUs the codes of every expert lie in the tiles of `quantized/packing.py` (the bits, whatever they mean): words
int32 [E, B, N, 16], 4 bits a number for mxfp4 and 8 for fp8. Scales are [E, G, N] (mxfp4: the bytes), for blocks
[E, ceil(K / 128), ceil(N / 128)]; zero points int8 [E, G, N]. On a CPU every expert is a weight of its own (`rows`).

Shapes: E experts, N output features, K input features, G groups. Source of mxfp4: OCP Microscaling Formats 1.0; its
layout on disk is that of gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels.launch import ceil_div
from trine.kernels.quantized.activations import BLOCK
from trine.kernels.quantized.packing import WORDS, PackedWeight, block_size, pack, unpack
from trine.kernels.quantized.packing import _to_tiles as to_tiles
from trine.kernels.quantized_moe.rows import FloatRows
from trine.kernels.target import on_device, uses_triton

# Bits of a code, by kind.
KINDS = {"int4": 4, "int8": 8, "fp8": 8, "mxfp4": 4}
_MX_GROUP = 32


@dataclass(frozen=True)
class PackedExperts:
    """Made by `pack_experts`, `join_experts`, `float8_experts` or `mxfp4_experts`.

    On a GPU `words`, `scales` and `zeros`, else `rows`.

    `spread`: features that share a scale, 1 or 128.
    """

    kind: str
    num_experts: int
    num_features: int
    width: int
    words: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    spread: int
    rows: tuple[PackedWeight | FloatRows, ...]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device if self.scales is None else self.scales.device

    @property
    def scheme(self) -> str:
        """All that two projections of one kernel must share, in words."""
        shape = [self.num_experts, self.num_features, self.width]
        scales, zeros = self.scales, self.zeros
        if scales is None:
            first = self.rows[0]
            scales, zeros = first.scales, first.zeros if isinstance(first, PackedWeight) else None
        else:
            scales = scales[0]
        points = "no" if zeros is None else "with"
        return f"{self.kind} {shape}, scales {scales.dtype} {list(scales.shape)} of an expert, {points} zero points"

    @property
    def num_bytes(self) -> int:
        """What the weights hold in memory."""
        kept = [tensor for tensor in (self.words, self.scales, self.zeros) if tensor is not None]
        return sum(tensor.nbytes for tensor in kept) + sum(weight.num_bytes for weight in self.rows)

    def to(self, device: torch.device | str) -> PackedExperts:
        """On another device, in the layout of that device."""
        if on_device(self.device, device):
            return self
        each = (self.plain(expert) for expert in range(self.num_experts))
        if not self.kind.startswith("int"):
            codes, scales, _ = zip(*each, strict=True)
            moved = torch.stack(codes).to(device), torch.stack(scales).to(device)
            return _floats(self.kind, *moved, self.width, self.spread)

        def packed(values_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None) -> PackedWeight:
            zeros_NG = None if zeros_NG is None else zeros_NG.to(device)
            return pack(values_NK.to(device), scales_NG.to(device), zeros_NG, bits=KINDS[self.kind])

        return join_experts((packed(*parts) for parts in each), self.num_experts)

    def plain(self, expert: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes, scales and zero points of one expert, as they were given.

        Codes are int8 [N, K]: of fp8 its bytes, of mxfp4 [N, K / 2], each two codes.
        """
        if self.words is None or self.scales is None:
            rows = self.rows[expert]
            return unpack(rows) if isinstance(rows, PackedWeight) else (rows.codes, rows.scales, None)
        bits, scales = KINDS[self.kind], self.scales[expert].t().contiguous()
        # The words hold bits, whatever they mean. Scales of blocks do not say how many outputs there are.
        of_rows = self.scales.new_empty(1, self.num_features)
        codes, _, _ = unpack(PackedWeight(self.words[expert], of_rows, None, None, bits, self.width, "tiles"))
        if self.kind == "mxfp4":
            codes = codes[:, ::2] & 15 | codes[:, 1::2] << 4
        return codes, scales, None if self.zeros is None else self.zeros[expert].t().contiguous()


def pack_experts(
    values_ENK: Tensor, scales_ENG: Tensor, zeros_ENG: Tensor | None = None, *, bits: int
) -> PackedExperts:
    """Experts of 4 or 8 bits, from what `packing.pack` takes for each. Raises ValueError as it does."""
    _check_dims("values", values_ENK, "scales", scales_ENG, 3)
    if zeros_ENG is not None and zeros_ENG.shape != scales_ENG.shape:
        raise ValueError(
            f"zeros have shape {tuple(zeros_ENG.shape)}; expected {tuple(scales_ENG.shape)}, as the scales"
        )

    def one(expert: int) -> PackedWeight:
        zeros_NG = None if zeros_ENG is None else zeros_ENG[expert]
        return pack(values_ENK[expert], scales_ENG[expert], zeros_NG, bits=bits)

    return join_experts((one(expert) for expert in range(len(values_ENK))), len(values_ENK))


def join_experts(weights: Iterable[PackedWeight], num_experts: int) -> PackedExperts:
    """Experts that were packed one by one (`packing.pack`, `packing.pack_words`), all of them alike.

    They are taken one after the other, so that only one is in memory twice. Raises ValueError for none, for another
    number than `num_experts`, and for experts that differ in bits, shape, groups or dtype of scales, zero points or
    device.
    """
    first: PackedWeight | None = None
    rows: list[PackedWeight] = []
    stacks: list[Tensor] = []
    count = 0
    for weight in weights:
        if first is None:
            first = weight
            stacks = [one.new_empty(num_experts, *one.shape) for one in _tensors(weight)]
        if _form(weight) != _form(first) or count == num_experts:
            raise ValueError(f"expert {count} of {num_experts} is {_form(weight)} but the first is {_form(first)}")
        if weight.layout != "tiles":
            rows.append(weight)
        else:
            for stack, tensor in zip(stacks, _tensors(weight), strict=True):
                stack[count] = tensor
        count += 1
    if first is None or count != num_experts:
        raise ValueError(f"there are {count} experts; expected {num_experts}, at least one")
    kind, sizes = f"int{first.bits}", (num_experts, first.num_features, first.width)
    if rows:
        return PackedExperts(kind, *sizes, None, None, None, 1, tuple(rows))
    words, scales, *zeros = stacks
    return PackedExperts(kind, *sizes, words, scales, zeros[0] if zeros else None, 1, ())


def _tensors(weight: PackedWeight) -> list[Tensor]:
    """What of a weight in "tiles" is stacked; of others nothing is."""
    if weight.layout != "tiles":
        return []
    return [one for one in (weight.words, weight.scales, weight.zeros) if one is not None]


def _form(weight: PackedWeight) -> str:
    """All that experts of one projection must share, in words."""
    scales, points = weight.scales, "no" if weight.zeros is None else "with"
    shape = [weight.num_features, weight.width]
    return f"{weight.bits}-bit {shape}, scales {scales.dtype} {list(scales.shape)} on {scales.device}, {points} zeros"


def float8_experts(codes_ENK: Tensor, scales: Tensor) -> PackedExperts:
    """Experts of float8_e4m3fn codes; scales of any float dtype, kept in fp32.

    Scales are [E], [E, 1] or [E, 1, 1] (one for an expert), [E, N] or [E, N, 1] (one for a row), or
    [E, ceil(N / 128), ceil(K / 128)] (blocks). Raises ValueError for anything else and for codes of NaN.
    """
    if codes_ENK.dim() != 3 or codes_ENK.dtype != torch.float8_e4m3fn or 0 in (len(codes_ENK), codes_ENK.shape[2]):
        raise ValueError(
            f"codes are {codes_ENK.dtype} {tuple(codes_ENK.shape)}; expected float8_e4m3fn [E, N, K], E and K positive"
        )
    num_experts, num_features, width = codes_ENK.shape
    by_row = [(num_experts, num_features), (num_experts, num_features, 1)]
    by_expert = [(num_experts,), (num_experts, 1), (num_experts, 1, 1)]
    blocks = (num_experts, ceil_div(num_features, BLOCK), ceil_div(width, BLOCK))
    shape = tuple(scales.shape)
    if not scales.is_floating_point() or shape not in (*by_row, *by_expert, blocks):
        raise ValueError(
            f"scales are {scales.dtype} {shape} for codes {tuple(codes_ENK.shape)}; expected floating point in one of "
            f"the shapes {', '.join(map(str, (*by_expert, *by_row, blocks)))}"
        )
    bytes_ENK = codes_ENK.contiguous().view(torch.int8)
    if bool((bytes_ENK & 127 == 127).any()):
        raise ValueError("codes hold NaN")
    blocked = shape == blocks and shape not in (*by_row, *by_expert)
    scales = scales.float()
    if not blocked:
        scales = scales.reshape(num_experts, -1, 1).expand(num_experts, num_features, 1)
    return _floats("fp8", bytes_ENK, scales, width, BLOCK if blocked else 1)


def mxfp4_experts(blocks_ENGB: Tensor, scales_ENG: Tensor) -> PackedExperts:
    """Experts of MXFP4 as gpt-oss has them on disk.

    uint8 blocks [E, N, K / 32, 16], each byte two codes (even k in the low half), and uint8 scales [E, N, K / 32].
    Fused tensors may be sliced first (`blocks[:, ::2]` is the gate of gpt-oss). Raises ValueError for another dtype or
    shape, and for a scale of 255, which is NaN.
    """
    _check_dims("blocks", blocks_ENGB, "scales", scales_ENG, 4)
    shape = tuple(blocks_ENGB.shape)
    if blocks_ENGB.dtype != torch.uint8 or shape[3] != 16 or 0 in shape[2:]:
        raise ValueError(f"blocks are {blocks_ENGB.dtype} {shape}; expected uint8 [E, N, K / 32, 16]")
    if scales_ENG.dtype != torch.uint8 or tuple(scales_ENG.shape) != shape[:3]:
        raise ValueError(f"scales are {scales_ENG.dtype} {tuple(scales_ENG.shape)}; expected uint8 {shape[:3]}")
    if bool((scales_ENG == 255).any()):
        raise ValueError("scales hold 255, which stands for NaN")
    return _floats("mxfp4", blocks_ENGB.flatten(2).view(torch.int8), scales_ENG, shape[2] * _MX_GROUP, 1)


def _check_dims(name: str, codes: Tensor, other: str, scales: Tensor, dims: int) -> None:
    if codes.dim() != dims or scales.dim() != 3 or len(codes) == 0 or codes.shape[:2] != scales.shape[:2]:
        raise ValueError(
            f"{name} have shape {tuple(codes.shape)} and {other} {tuple(scales.shape)}; expected {dims} and 3 "
            "dimensions that begin with the same E and N, E positive"
        )


def _floats(kind: str, bytes_ENK: Tensor, scales_ENG: Tensor, width: int, spread: int) -> PackedExperts:
    """From bytes [E, N, K], or [E, N, K / 2] of two codes; scales [E, N / spread, G]."""
    num_experts, num_features, _ = bytes_ENK.shape
    if not uses_triton(bytes_ENK):
        pairs = zip(bytes_ENK.unbind(0), scales_ENG.unbind(0), strict=True)
        rows = tuple(FloatRows(codes.contiguous(), scales.contiguous(), kind, spread) for codes, scales in pairs)
        return PackedExperts(kind, num_experts, num_features, width, None, None, None, spread, rows)

    def words(expert: int) -> Tensor:
        codes = bytes_ENK[expert]
        if kind == "mxfp4":
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        return to_tiles(codes, KINDS[kind])

    packed = _stacked(num_experts, num_features, width, KINDS[kind], bytes_ENK.device, words)
    scales = scales_ENG.transpose(1, 2).contiguous()
    return PackedExperts(kind, num_experts, num_features, width, packed, scales, None, spread, ())


def _stacked(
    num_experts: int, num_features: int, width: int, bits: int, device: torch.device, one: Callable[[int], Tensor]
) -> Tensor:
    """Words [E, B, N, 16], made expert by expert, so that only one of them is in memory twice."""
    shape = (num_experts, ceil_div(width, block_size(bits)), num_features, WORDS)
    words = torch.empty(shape, dtype=torch.int32, device=device)
    for expert in range(num_experts):
        words[expert] = one(expert)
    return words
