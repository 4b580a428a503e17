"""What a step multiplies by: a weight in one of the forms that the loops read, with its bias.

    Projection        fp32 or bf16; int8 with a scale a row; float8 with one a row or block; int4 with one for 32 inputs
    LanesProjection   4 or 8 bits in the layout "lanes" (`codes.py`), as a quantized checkpoint is held for all products

Shapes: M rows, K inputs, N outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.codes import LANES, LanesWeight, dequantize_lanes
from trine.kernels.cpu.compiled import address, array, single

# Kinds of numbers, as in `product_loops.py` (which imports Numba). Inputs of a shorter row are not rounded.
FLOAT32, BFLOAT16, INT8, FLOAT8, TILES, DOTS, INT8_CODES, INT8_TOKENS, INT4_CODES = range(9)
# What `measured.py` calls them.
NAMES = ("float32", "bfloat16", "int8 by float32", "float8", "lanes", "lanes", "int8", "int8 by int8", "int4")
SHORTEST = 64
# Of int4: codes of one half of 64 bytes, and codes with one scale.
CODES_OF_HALF, SCALED = 64, 32
# Of float8 with scales of blocks: inputs with one.
BLOCKED = 128
# Of scales, as in `codes_loops.py`.
_SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# x w^T + bias of rows [M, K] in fp32.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Projection:
    """A weight [outputs, inputs] in fp32 or bf16; or codes, with a bias where there is one.

    int8 codes have one scale a row. int4 codes, made by `int4_projection`, have one for every 32 inputs. `round_inputs`
    (always for int4): inputs are rounded to int8 with a scale for every 64 of them, which is about as large an error as
    that of the weight's own rounding to 8 bits, and a third of the arithmetic. `per_row`: with one scale for each row
    of inputs, as `quantized/activations.py` rounds them (int8 only, of at least 64 inputs). float8 (e4m3) codes, none
    of which is NaN, have one scale a row, and inputs become float8 numbers so; or scales [ceil(N / spread), ceil(K /
    128)], each of `spread` outputs and 128 inputs, and inputs have one for as many. `product`: of more rows than loops
    take; without one, a copy of the weight is made for it.
    """

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    round_inputs: bool = True
    num_inputs: int | None = None  # of int4, whose rows are filled up
    per_row: bool = False
    product: Product | None = None
    spread: int = 1

    @property
    def inputs(self) -> int:
        """The numbers of an input."""
        return self.weight.shape[1] if self.num_inputs is None else self.num_inputs

    @property
    def outputs(self) -> int:
        """The numbers of a result."""
        return len(self.weight)

    @property
    def kind(self) -> int:
        """As in `product_loops.py`."""
        if self.per_row:
            return INT8_TOKENS
        if self.num_inputs is not None:
            return INT4_CODES
        if self.weight.dtype == torch.float8_e4m3fn:
            return FLOAT8
        if self.weight.dtype == torch.int8:
            return INT8_CODES if self.round_inputs and self.inputs >= SHORTEST else INT8
        return FLOAT32 if self.weight.dtype == torch.float32 else BFLOAT16

    def dense(self) -> Tensor:
        """The weight [N, K] in fp32."""
        if self.scales is None:
            return self.weight.float()
        if self.scales.dim() == 2 and self.num_inputs is None:
            lines = self.scales.float().repeat_interleave(self.spread, 0)[: len(self.weight)]
            return self.weight.float() * lines.repeat_interleave(BLOCKED, 1)[:, : self.inputs]
        if self.num_inputs is None:
            return self.weight.float() * self.scales.float()[:, None]
        pairs = self.weight.unflatten(1, (-1, CODES_OF_HALF))
        codes = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1).to(torch.int8) - 8
        values = codes.float().unflatten(1, (-1, SCALED)) * self.scales.float()[:, :, None]
        filled: Tensor = values.flatten(1)
        return filled[:, : self.num_inputs].contiguous()

    def check(self, name: str, inputs: int | None = None) -> None:
        """Raise ValueError for what the loops do not take."""
        weight, quantized = self.weight, self.weight.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)
        known = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
        known = known if self.num_inputs is None else [torch.uint8]
        if weight.dim() != 2 or weight.dtype not in known:
            raise ValueError(
                f"{name} is {weight.dtype} {tuple(weight.shape)}; expected [N, K] in fp32, bf16, int8 or"
                " float8_e4m3fn, or what int4_projection makes"
            )
        _check_inputs(name, self.inputs, inputs)
        if weight.dtype == torch.float8_e4m3fn and self.inputs < SHORTEST:
            raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}; it takes at least {SHORTEST} inputs")
        if self.per_row and (weight.dtype != torch.int8 or self.inputs < SHORTEST):
            raise ValueError(
                f"{name} is {weight.dtype} {tuple(weight.shape)}; inputs are rounded row by row for int8 of at least"
                f" {SHORTEST} inputs"
            )
        if quantized != (self.scales is not None):
            raise ValueError(f"scales are {'missing for' if quantized else 'given with'} {name} of {weight.dtype}")
        if self.scales is not None and weight.dtype == torch.uint8 and self.scales.dtype != torch.float16:
            raise ValueError(f"scales of {name} are {self.scales.dtype}; int4_projection makes fp16")
        blocked = self.scales is not None and self.scales.dim() == 2 and weight.dtype == torch.float8_e4m3fn
        blocks = (-(-len(weight) // self.spread), -(-self.inputs // BLOCKED))
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"bias": (self.bias, (len(weight),))}
        if weight.dtype != torch.uint8:
            shapes["scales"] = self.scales, blocks if blocked else (len(weight),)
        for part, (x, shape) in shapes.items():
            if x is not None and tuple(x.shape) != shape:
                raise ValueError(f"{part} of {name} have shape {tuple(x.shape)}; expected {shape}")

    def fields(self, keep: list[Any]) -> list[int]:
        """`FIELDS` of `product_loops.py`; the memory that they point to is put into `keep`."""
        stored = self.weight.contiguous()
        weight = array(stored.view(torch.uint8) if self.kind == FLOAT8 else stored)
        if self.scales is not None and self.scales.dtype == torch.float16:
            scales = self.scales.contiguous().numpy()
        else:
            scales = single(None if self.scales is None else self.scales * (2.0**8 if self.kind == FLOAT8 else 1.0))
        bias = single(self.bias)
        keep += (weight, scales, bias)
        scales_step = scales.strides[0] if scales.size else 0
        groups = 1 if scales.ndim == 1 else scales.shape[1]
        return [
            self.kind, weight.ctypes.data, len(weight), self.inputs, weight.strides[0], address(scales), scales_step,
            address(bias), 0, 0, 0, self.spread, groups, 0,
        ]  # fmt: skip


@dataclass(frozen=True)
class LanesProjection:
    """A weight made by `codes.to_lanes`, whose memory is used as it lies; inputs are not rounded.

    `dots`: by whole numbers (`dots_loops.py`), or in fp32; None: as is faster on this CPU.
    """

    weight: LanesWeight
    bias: Tensor | None = None
    product: Product | None = None
    dots: bool | None = None
    scales: None = None

    @property
    def kind(self) -> int:
        """As in `product_loops.py`."""
        return DOTS if (_has_dots() if self.dots is None else self.dots) else TILES

    @property
    def inputs(self) -> int:
        """The numbers of an input."""
        return self.weight.width

    @property
    def outputs(self) -> int:
        """The numbers of a result."""
        return self.weight.num_features

    def dense(self) -> Tensor:
        """The weight [N, K] in fp32."""
        return dequantize_lanes(self.weight, torch.float32)

    def check(self, name: str, inputs: int | None = None) -> None:
        """Raise ValueError for what the loops do not take."""
        _check_inputs(name, self.inputs, inputs)
        if self.bias is not None and tuple(self.bias.shape) != (self.outputs,):
            raise ValueError(f"bias of {name} has shape {tuple(self.bias.shape)}; expected ({self.outputs},)")

    def fields(self, keep: list[Any]) -> list[int]:
        """As of `Projection`."""
        from trine.kernels.cpu.product_codes_loops import lanes_address

        return lanes_fields(self.weight, self.bias, keep, self.kind, lanes_address(self.kind, self.weight.bits))


def lanes_fields(
    weight: LanesWeight, bias_N: Tensor | None, keep: list[Any], kind: int = DOTS, multiply: int = 0
) -> list[int]:
    """`FIELDS` of `product_loops.py` for such a weight; `multiply`: the address of what multiplies it in a step."""
    bias = single(bias_N)
    keep += (weight, bias)
    zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
    return [
        kind, weight.words.data_ptr(), weight.num_features, weight.width, 4 * LANES * weight.words.shape[1],
        weight.scales.data_ptr(), 0, address(bias), multiply, zeros, _SCALE_KINDS[weight.scales.dtype], weight.chunk,
        weight.groups, weight.bits,
    ]  # fmt: skip


AnyProjection = Projection | LanesProjection


def _has_dots() -> bool:
    from trine.kernels.cpu.vector_loops import has_dot_instruction

    return has_dot_instruction()


def _check_inputs(name: str, takes: int, gets: int | None) -> None:
    if gets is not None and takes != gets:
        raise ValueError(f"{name} takes {takes} inputs; its layer gives {gets}")


def int4_projection(values_NK: Tensor, scales_NG: Tensor, bias_N: Tensor | None = None) -> Projection:
    """The projection of codes in -8 to 7 (int8, [N, K]) with scales for every 32, 64 or 128 inputs, or one for a row.

    The layout: 64 bytes a row hold 128 codes as q + 8, of which the first 64 are in the low halves; rows are filled up.
    Scales become fp16, one for 32 inputs. Raises ValueError for other shapes, dtypes or codes.
    """
    N, K = values_NK.shape
    groups = scales_NG.shape[1] if scales_NG.dim() == 2 else 0
    size = K // groups if groups > 1 else K
    if values_NK.dtype != torch.int8 or len(scales_NG) != N or not groups or size * groups != K:
        raise ValueError(
            f"codes are {values_NK.dtype} {(N, K)} and scales {tuple(scales_NG.shape)}; expected int8 [N, K] and [N, G]"
        )
    if groups > 1 and size not in (32, 64, 128):
        raise ValueError(f"a scale stands for {size} inputs; supported are 32, 64 and 128, or all of a row")
    if values_NK.numel() and not -8 <= int(values_NK.min()) <= int(values_NK.max()) <= 7:
        raise ValueError(f"codes lie in {int(values_NK.min())} to {int(values_NK.max())}; 4 bits hold -8 to 7")
    blocks = -(-K // (2 * CODES_OF_HALF))
    filled = F.pad(values_NK, (0, 2 * CODES_OF_HALF * blocks - K)) + 8
    halves = filled.view(torch.uint8).view(N, blocks, 2, CODES_OF_HALF)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    stretched = scales_NG.repeat_interleave(-(-size // SCALED), dim=1)
    scales = F.pad(stretched, (0, 2 * CODES_OF_HALF // SCALED * blocks - stretched.shape[1])).half()
    if not scales.isfinite().all():
        raise ValueError(f"scales reach {float(scales_NG.abs().max()):.3g}; fp16 holds up to 65504")
    return Projection(packed.flatten(1), scales, bias_N, num_inputs=K)
