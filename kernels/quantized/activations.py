"""Activations quantized while the model runs: int8 or float8 (e4m3) codes with scales found from the numbers.

    s = max |x| / limit     q = round(x / s)      (limit 127 for int8, 448 for e4m3; to nearest, ties to even)

over each row (token), or over each 128 numbers of a row where the weight has scales of blocks; or with one scale given.
Divisions are exact, so that codes and scales have the same bits everywhere. A row with NaN or infinity has the scale
NaN, a row of zeros the scale 1e-30. With a scale given NaN is NaN in float8, but 0 in int8, and what is beyond the
limit is cut off.

`rms_norm_quantize` normalises the row first (and adds a residual before), without writing the normalised row. The
codes are those of the norm in fp32, which is not rounded to the dtype of x in between.

One launch over M K numbers: reads them in the dtype of x, writes one byte each and the scales; with a residual reads
and writes those too.
Source: dynamic quantization per token as in ZeroQuant (Yao et al. 2022, arXiv 2206.01861); blocks of 128 as in
DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.cpu.quantize import FLOAT8_LIMIT, LIMIT, SMALLEST_SCALE
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

BLOCK = 128
# The longest row that fits a program's registers.
MAX_WIDTH = 65536
# The largest code of each kind.
LIMITS = {torch.int8: LIMIT, torch.float8_e4m3fn: FLOAT8_LIMIT}


@dataclass(frozen=True)
class QuantizedRows:
    """Codes [..., K] in int8 or float8_e4m3fn, and the dtype of the activations they stand for.

    `scales` fp32: [..., 1] of each row, [..., ceil(K / 128)] of its blocks (float8 only), or [1] of all.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that the codes stand for, in fp32 (float64 in float64) and then in `dtype`."""
        dtype = dtype or self.dtype
        work = torch.promote_types(dtype, torch.float32)
        scales = self.scales.to(work)
        if scales.shape[-1] > 1:
            scales = scales.repeat_interleave(BLOCK, -1)[..., : self.codes.shape[-1]]
        return (self.codes.to(work) * scales).to(dtype)


def quantize_reference(
    x_MK: Tensor, kind: torch.dtype, *, blocks: bool = False, scale: Tensor | None = None
) -> QuantizedRows:
    """The formula in torch. On a CPU this is what runs."""
    x = x_MK.float()
    width = x.shape[-1]
    if scale is None:
        parts = (
            torch.nn.functional.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK)) if blocks else x[..., None, :]
        )
        # An empty row has nothing to find the largest of.
        largest = parts.abs().amax(dim=-1) if width else x.new_zeros(*x.shape[:-1], parts.shape[-2])
        # By a tensor: on a GPU torch multiplies with the reciprocal of a number, which rounds otherwise.
        scale = (largest / torch.full_like(largest, LIMITS[kind])).clamp(min=SMALLEST_SCALE) + (parts * 0).sum(dim=-1)
    spread = scale.repeat_interleave(BLOCK, -1)[..., :width] if blocks else scale
    return QuantizedRows(_round(x / spread, kind), scale, x_MK.dtype)


def _round(scaled: Tensor, kind: torch.dtype) -> Tensor:
    scaled = scaled.clamp(-LIMITS[kind], LIMITS[kind])
    return scaled.round().nan_to_num(0).to(torch.int8) if kind == torch.int8 else scaled.to(kind)


# --- Triton -----------------------------------------------------------------------------------------------------------

# Added and taken away again, this rounds an fp32 number below 2^22 to the nearest integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _write_codes(
    y, codes_ptr, scales_ptr, static_ptr, rows, num_rows, width, LIMIT: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize y fp32 [ROWS, GROUPS x GROUP], zero outside, with a scale for each GROUP numbers or the one given."""
    y = tl.reshape(y, [ROWS, GROUPS, GROUP])
    groups = tl.arange(0, GROUPS)
    inside = (rows < num_rows)[:, None]
    if static_ptr is not None:
        scale = tl.zeros([ROWS, GROUPS], dtype=tl.float32) + tl.load(static_ptr)
    else:
        largest = tl.max(tl.abs(y), axis=2)
        # Zero times NaN or infinity is NaN.
        scale = tl.maximum(tl.div_rn(largest, tl.full([ROWS, GROUPS], LIMIT, tl.float32)), 1e-30) + tl.sum(
            y * 0.0, axis=2
        )
        num_groups = tl.cdiv(width, GROUP)
        places = rows[:, None].to(tl.int64) * num_groups + groups[None, :]
        tl.store(scales_ptr + places, scale, mask=inside & (groups < num_groups)[None, :])
    scaled = tl.div_rn(y, tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, GROUP]))
    scaled = tl.clamp(scaled, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if codes_ptr.dtype.element_ty == tl.int8:
        # What is not a number, as its scale is not, has any code.
        scaled = tl.where(scaled == scaled, (scaled + _ROUND) - _ROUND, 0.0)
    codes = tl.reshape(scaled.to(codes_ptr.dtype.element_ty), [ROWS, GROUPS * GROUP])
    columns = tl.arange(0, GROUPS * GROUP)
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(codes_ptr + places, codes, mask=inside & (columns < width)[None, :])


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    static_ptr,
    num_rows,
    width,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS whole rows. GROUP x GROUPS covers the width; GROUPS is 1 where a row has one scale."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, GROUPS * GROUP)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    _write_codes(x, codes_ptr, scales_ptr, static_ptr, rows, num_rows, width, LIMIT, GROUP, GROUPS, ROWS)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    codes_ptr,
    scales_ptr,
    static_ptr,
    num_rows,
    width,
    eps,
    UNIT_OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """As `quantize_rows_kernel`, of x / sqrt(mean(x^2) + eps) * weight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, GROUPS * GROUP)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None].to(tl.int64) * width + columns[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + places, x.to(sum_ptr.dtype.element_ty), mask=inside)
        # What is normalised is the sum as it is stored.
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    y = x * rstd[:, None] * weight[None, :]
    _write_codes(y, codes_ptr, scales_ptr, static_ptr, rows, num_rows, width, LIMIT, GROUP, GROUPS, ROWS)


# Numbers that a program holds at a time: enough loads in flight to saturate memory, few enough for registers.
_PROGRAM_NUMBERS = 4096


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    block = max(BLOCK, next_power_of_2(shape["K"]))
    if target.interpreted:
        return Config({"ROWS": 2})
    rows = max(1, min(32, _PROGRAM_NUMBERS // block))
    return Config({"ROWS": rows}, num_warps=min(16, max(4, rows * block // 1024)), num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    block = max(BLOCK, next_power_of_2(shape["K"]))
    return [
        Config({"ROWS": rows}, warps, 1)
        for rows in (1, 2, 4, 8, 16)
        for warps in (2, 4, 8, 16)
        if 1024 <= rows * block <= 64 * 32 * warps
    ]


QUANTIZE = Tunable("quantize_rows", _rule, _candidates)


def check_float8(kind: torch.dtype, target: Target) -> None:
    """Raises ValueError where `kind` is float8 and the GPU has none."""
    if kind != torch.int8 and target.arch.startswith("sm_") and int(target.arch[3:]) < 89:
        raise ValueError(f"float8 is not supported on {target.arch}; it needs sm_89 or newer, int8 does not")


def launch_quantize(x_MK: Tensor, kind: torch.dtype, blocks: bool, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scales [M, groups] (empty with a static scale); x contiguous."""
    codes_MK, scales_MG, arguments = _prepared(x_MK, kind, blocks, static)
    _start(quantize_rows_kernel, x_MK, arguments)
    return rounded(codes_MK, kind), scales_MG


def launch_rms_norm_quantize(
    x_MK: Tensor,
    residual_MK: Tensor | None,
    weight_K: Tensor,
    eps: float,
    unit_offset: bool,
    kind: torch.dtype,
    blocks: bool,
    static: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales as of `launch_quantize`, and x + residual (empty without a residual); x and residual contiguous."""
    codes_MK, scales_MG, arguments = _prepared(x_MK, kind, blocks, static)
    total = torch.empty_like(x_MK if residual_MK is not None else x_MK.new_empty(0), dtype=result_dtype(x_MK.dtype))
    arguments |= {
        "residual_ptr": residual_MK,
        "weight_ptr": weight_K.contiguous(),
        "sum_ptr": None if residual_MK is None else total,
        "eps": eps,
        "UNIT_OFFSET": unit_offset,
    }
    _start(rms_norm_quantize_kernel, x_MK, arguments)
    return rounded(codes_MK, kind), scales_MG, rounded(total, x_MK.dtype)


def _prepared(
    x_MK: Tensor, kind: torch.dtype, blocks: bool, static: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, object]]:
    check_float8(kind, target_of(x_MK))
    num_rows, width = x_MK.shape
    codes_MK = x_MK.new_empty(num_rows, width, dtype=result_dtype(kind))
    groups = ceil_div(width, BLOCK) if blocks else 1
    scales_MG = x_MK.new_empty(num_rows if static is None else 0, groups, dtype=torch.float32)
    block = max(BLOCK, next_power_of_2(width))
    return (
        codes_MK,
        scales_MG,
        {
            "x_ptr": x_MK,
            "codes_ptr": codes_MK,
            "scales_ptr": scales_MG,
            "static_ptr": static,
            "num_rows": num_rows,
            "width": width,
            "LIMIT": LIMITS[kind],
            "GROUP": BLOCK if blocks else block,
            "GROUPS": block // BLOCK if blocks else 1,
        },
    )


def _start(kernel: object, x_MK: Tensor, arguments: dict[str, object]) -> None:
    config = QUANTIZE.pick(x_MK.dtype, target_of(x_MK), M=x_MK.shape[0], K=x_MK.shape[1])
    launch(kernel, (ceil_div(x_MK.shape[0], config.blocks["ROWS"]),), config, arguments)
