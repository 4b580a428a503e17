"""Products of 8-bit codes with 8-bit codes, int8 or float8 (e4m3): the scales come to the sums.

    rows and features    y[m, n] = sx[m] sw[n] sum_k qx[m, k] qw[n, k]
    blocks of 128        y[m, n] = sum_b sx[m, b] sw[n // 128, b] sum_{k in b} qx[m, k] qw[n, k]

Sums of int8 are int32 and exact. Tensor cores of Hopper keep fewer bits of a sum of float8 products than fp32 has
(about 14), which at K = 4096 is an error of up to 2 % (DeepSeek-V3, arXiv 2412.19437). So the sums of each 128 numbers
are added up in fp32 outside of them, which blocks need anyway; `fast` leaves that out, which makes room for larger
tiles and is what cuBLAS does with `use_fast_accum`. On other GPUs sums are fp32, and `fast` changes nothing.

A program owns a tile of [features, rows], the weight as first operand: 64 features and 16 rows are enough for Hopper's
tensor cores. Few rows are bound by reading the weight, N K bytes; there K is split over programs (`epilogue.py`).
Operations: 2 M N K, twice that with a gate.

Large float8 products go to the kernel in `hopper.py` where that has been verified.

e4m3 needs sm_89 or newer. On gfx942, whose own format is e4m3fnuz, Triton converts to fp16 first: right, not fast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.last_program import counters
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.quantized import hopper
from trine.kernels.quantized.activations import BLOCK, check_float8
from trine.kernels.quantized.epilogue import end_tile, launch_combine
from trine.kernels.quantized.weight_only import splits_for
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

# Codes [N, K] and scales: [N] of features, [1] of all, or [ceil(N / 128), ceil(K / 128)] of blocks.
Scaled = tuple[Tensor, Tensor]


@triton.jit
def _load(ptr, inner, outer, left, EVEN: tl.constexpr):
    """Codes at offsets `outer`; zero where `inner` is past the `left` numbers of the row."""
    return tl.load(ptr + outer) if EVEN else tl.load(ptr + outer, mask=inner < left, other=0.0)


@triton.jit
def _accumulate(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, row, feature, start, stop, num_rows, num_features, width,
    x_scale_stride, w_scale_stride,
    EVEN: tl.constexpr, BLOCKED: tl.constexpr, FAST: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Scaled sums fp32 [FEATURES, ROWS] over the pieces start to stop of K; over an edge repeat the last."""
    features = tl.minimum(tl.arange(0, FEATURES), num_features - 1 - feature)
    rows = tl.minimum(tl.arange(0, ROWS), num_rows - 1 - row)
    inner = tl.arange(0, INNER)
    w_places = features[:, None] * width + inner[None, :]
    x_places = rows[None, :] * width + inner[:, None]
    w_ptr += tl.cast(feature, tl.int64) * width
    x_ptr += tl.cast(row, tl.int64) * width
    KIND: tl.constexpr = tl.int32 if w_ptr.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros([FEATURES, ROWS], dtype=KIND)
    if BLOCKED:
        x_scales_ptr += (row + rows).to(tl.int64) * x_scale_stride
        w_scales_ptr += feature // 128 * w_scale_stride
        last = tl.cdiv(width, INNER) - 1
        scale = tl.load(x_scales_ptr + tl.minimum(start, last)) * tl.load(w_scales_ptr + tl.minimum(start, last))
    for piece in range(start, stop):
        left = width - piece * INNER
        w = _load(w_ptr + piece * INNER, inner[None, :], w_places, left, EVEN)
        x = _load(x_ptr + piece * INNER, inner[:, None], x_places, left, EVEN)
        if BLOCKED:
            after = tl.minimum(piece + 1, last)
            next_scale = tl.load(x_scales_ptr + after) * tl.load(w_scales_ptr + after)
            sums += tl.dot(w, x) * scale[None, :]
            scale = next_scale
        elif FAST:
            sums = tl.dot(w, x, sums, out_dtype=KIND)
        else:
            # Not by tl.dot's max_num_imprecise_acc: in a pipelined loop Triton 3.7 adds before the product is done.
            sums += tl.dot(w, x)
    if not BLOCKED:
        sums = sums.to(tl.float32) * tl.load(w_scales_ptr + (feature + features) * w_scale_stride)[:, None]
        sums *= tl.load(x_scales_ptr + (row + rows) * x_scale_stride)[None, :]
    return sums


@triton.jit
def scaled_matmul_kernel(
    x_ptr,
    x_scales_ptr,
    gate_ptr,
    gate_scales_ptr,
    gate_bias_ptr,
    up_ptr,
    up_scales_ptr,
    up_bias_ptr,
    y_ptr,
    parts_ptr,
    counter_ptr,
    num_rows,
    num_features,
    width,
    x_scale_stride,
    w_scale_stride,
    limit,
    EVEN: tl.constexpr,
    BLOCKED: tl.constexpr,
    FAST: tl.constexpr,
    EARLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of y, or one part of its sums. Programs run in groups of GROUP tiles of features, rows inside."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    feature_tiles = tl.cdiv(num_features, FEATURES)
    row_tiles = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    first = program // (GROUP * row_tiles) * GROUP
    size = tl.minimum(feature_tiles - first, GROUP)
    within = program % (GROUP * row_tiles)
    feature = (first + within % size) * FEATURES
    row = within // size * ROWS
    split = tl.program_id(1)
    pieces = tl.cdiv(width, INNER)
    each = tl.cdiv(pieces, SPLITS)
    start = split * each
    stop = tl.minimum(start + each, pieces)
    up = _accumulate(
        x_ptr, x_scales_ptr, up_ptr, up_scales_ptr, row, feature, start, stop, num_rows, num_features, width,
        x_scale_stride, w_scale_stride, EVEN, BLOCKED, FAST, FEATURES, ROWS, INNER,
    )  # fmt: skip
    gate = up
    if gate_ptr is not None:
        gate = _accumulate(
            x_ptr, x_scales_ptr, gate_ptr, gate_scales_ptr, row, feature, start, stop, num_rows, num_features, width,
            x_scale_stride, w_scale_stride, EVEN, BLOCKED, FAST, FEATURES, ROWS, INNER,
        )  # fmt: skip
    end_tile(
        gate, up, y_ptr, parts_ptr, counter_ptr, gate_bias_ptr, up_bias_ptr, row, feature,
        tl.cast(num_rows, tl.int64) * num_features, num_rows, num_features, limit, gate_ptr is not None, ACTIVATION,
        SPLITS, FEATURES, ROWS,
    )  # fmt: skip


# --- configurations ---------------------------------------------------------------------------------------------------


def shared_estimate(config: Config) -> int:
    """Bytes of shared memory that the pipelined loop holds at most."""
    return config.num_stages * (config.blocks["FEATURES"] + config.blocks["ROWS"]) * config.blocks["INNER"]


def _config(shape: Shape, target: Target, features: int, rows: int, warps: int, *, group: int = 16) -> Config:
    """With as many stages, up to four, as fit in shared memory beside 16 KiB for the epilogue."""
    inner = BLOCK
    tiles = ceil_div(shape["N"], features) * ceil_div(shape["M"], rows)
    splits = splits_for(tiles, ceil_div(shape["K"], inner), shape["M"], shape["K"], target)
    blocks = {"FEATURES": features, "ROWS": rows, "INNER": inner, "GROUP": group, "SPLITS": splits}
    stages = (target.shared_bytes - 16 * 1024) // shared_estimate(Config(blocks, warps, 1))
    return Config(blocks, warps, max(1, min(2 if target.is_amd else 4, stages)))


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        splits = 2 if shape["M"] <= 16 and shape["K"] > BLOCK else 1
        return Config({"FEATURES": 16, "ROWS": 16, "INNER": BLOCK, "GROUP": 2, "SPLITS": splits})
    rows = max(16, next_power_of_2(min(shape["M"], 128)))
    if rows < 128:
        return _config(shape, target, 64, rows, 4)
    # With a gate, or where sums are added up outside of tensor cores, two tiles of them are alive at a time.
    single = not shape["exact_partial"] and shape["exact_products"] == 1
    if target.is_amd and dtype != torch.int8 and not shape["exact_partial"]:
        return _config(shape, target, 64, 128 if single else 64, 8)
    if target.arch == "sm_100" and not single:
        return _config(shape, target, 64, 128, 8)
    if target.is_hopper and shape["exact_partial"] and shape["exact_products"] == 1:
        # Small tiles: while one program adds up its sums, tensor cores work for another.
        return _config(shape, target, 64, 128, 4, group=32)
    return _config(shape, target, 128, 256 if single and shape["M"] > 128 and target.arch != "sm_80" else 128, 8)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        _config(shape, target, features, rows, warps)
        for features in (64, 128)
        for rows in (16, 32, 64, 128, 256)
        for warps in (4, 8)
        if rows <= 2 * max(16, next_power_of_2(shape["M"])) and 8 <= features * rows // (32 * warps) <= 128
    ]


SCALED = Tunable("scaled_matmul", _rule, _candidates)


# --- launcher ---------------------------------------------------------------------------------------------------------


def launch_scaled(
    x_MK: Tensor,
    x_scales: Tensor,
    gate: Scaled | None,
    up: Scaled,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """y_MN in `dtype`. `x_scales` is [M, 1], [1] of all, or [M, blocks]; both weights have scales of one form."""
    num_rows, width = x_MK.shape
    codes_NK, scales = up
    num_features = codes_NK.shape[0]
    blocked = scales.dim() == 2
    shape = {"M": num_rows, "N": num_features, "K": width}
    target = target_of(x_MK)
    check_float8(codes_NK.dtype, target)
    fast = fast or codes_NK.dtype == torch.int8 or not (target.is_hopper or target.interpreted)
    if hopper.selected(x_MK, gate, up, activation, dtype):
        return hopper.launch_hopper(x_MK, x_scales, gate, up, gate_bias, up_bias, dtype, fast)
    shape |= {"exact_products": 1 + (gate is not None), "exact_partial": int(blocked or not fast)}
    config = SCALED.pick(codes_NK.dtype, target, **shape)
    splits = config.blocks["SPLITS"]
    blocks = config.blocks
    tiles = ceil_div(num_rows, blocks["ROWS"]) * ceil_div(num_features, blocks["FEATURES"])
    y_MN = x_MK.new_empty(num_rows, num_features, dtype=result_dtype(dtype))
    parts = counter = None
    if splits > 1:
        parts = x_MK.new_empty(shape["exact_products"], splits, num_rows, num_features, dtype=torch.float32)
        counter = counters(x_MK, tiles)
    arguments = {
        "x_ptr": x_MK,
        "x_scales_ptr": x_scales,
        "gate_ptr": None if gate is None else gate[0],
        "gate_scales_ptr": None if gate is None else gate[1],
        "gate_bias_ptr": gate_bias,
        "up_ptr": codes_NK,
        "up_scales_ptr": scales,
        "up_bias_ptr": up_bias,
        "y_ptr": y_MN,
        "parts_ptr": parts,
        "counter_ptr": counter,
        "num_rows": num_rows,
        "num_features": num_features,
        "width": width,
        "x_scale_stride": x_scales.shape[-1] if x_scales.dim() == 2 else 0,
        "w_scale_stride": scales.shape[1] if blocked else int(scales.numel() > 1),
        "limit": limit,
        "EVEN": width % config.blocks["INNER"] == 0,
        "BLOCKED": blocked,
        "FAST": fast,
        "EARLY": target.starts_early and parts is not None and counter is None,
        "ACTIVATION": activation,
    }
    launch(scaled_matmul_kernel, (tiles, splits), config, arguments)
    if parts is not None and counter is None:
        launch_combine(parts, y_MN, gate_bias, up_bias, activation, limit)
    return rounded(y_MN, dtype)
