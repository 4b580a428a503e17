"""Products with 4- and 8-bit weights, the activations in fp32, bf16 or fp16: one Triton kernel for few rows and many.

    y[m, n] = sum_g s[n, g] sum_{k in g} (q[n, k] - z[n, g]) x[m, k]

A program owns a tile of [features, rows], transposed: the decoded weight is the first operand, which tensor cores of
Hopper take from registers, and as few as 16 rows of x fill the other side. A slice of 32 numbers is decoded in
registers and multiplied; the fp32 sums of each group are multiplied by its scale in fp32. So the weight itself is never
rounded, and the scales cost one operation for each group and number of the result. Scales and zero points of the next
block are read while this one is worked on.

Few rows are bound by reading the weight: N K bits / 8 bytes. There K is split over programs (`epilogue.py`).
Operations: 2 M N K, twice that with a gate. For many rows see `op.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.last_program import counters
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.quantized.decode import decode_slice, group_constant
from trine.kernels.quantized.epilogue import end_tile, launch_combine
from trine.kernels.quantized.packing import WORDS, block_size
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

# Words, scales [G, N] and zero points of one weight, in the layout "tiles".
Packed = tuple[Tensor, Tensor, Tensor | None]


@triton.jit
def _of_group(ptr, column, width, num_features, features, GROUP: tl.constexpr):
    """Scales or zero points [G, N] of the group of a column, fp32; past the end of a row those of the last group."""
    if GROUP:
        ptr += (tl.minimum(column, width - 1) // GROUP).to(tl.int64) * num_features
    return tl.load(ptr + features).to(tl.float32)


@triton.jit
def _of_block(ptr, block, width, num_features, features, GROUP: tl.constexpr, BITS: tl.constexpr):
    """What the (at most four) slices of a block need of scales or zero points. Slices of one group share a load."""
    column = block * (512 // BITS)
    a = _of_group(ptr, column, width, num_features, features, GROUP)
    b = a
    c = a
    d = a
    if GROUP == 32:
        b = _of_group(ptr, column + 32, width, num_features, features, GROUP)
    if BITS == 4 and (GROUP == 32 or GROUP == 64):
        c = _of_group(ptr, column + 64, width, num_features, features, GROUP)
        d = c
    if BITS == 4 and GROUP == 32:
        d = _of_group(ptr, column + 96, width, num_features, features, GROUP)
    return a, b, c, d


@triton.jit
def _of_slice(a, b, c, d, SLICE: tl.constexpr):
    if SLICE == 0:
        value = a
    elif SLICE == 1:
        value = b
    elif SLICE == 2:
        value = c
    else:
        value = d
    return value


@triton.jit
def _accumulate(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    x_ptr,
    row,
    feature,
    start,
    stop,
    num_rows,
    num_features,
    width,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NVIDIA: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums [FEATURES, ROWS] over the blocks start to stop; a tile over the edge repeats the last feature."""
    features = tl.minimum(tl.arange(0, FEATURES), num_features - 1 - feature)
    rows = tl.arange(0, ROWS)
    inside = (rows < num_rows - row)[None, :]
    inner = tl.arange(0, 32)
    word_places = features[:, None] * 16 + tl.arange(0, 16)[None, :]
    x_places = rows[None, :] * width + inner[:, None]
    x_ptr += tl.cast(row, tl.int64) * width
    scales_ptr += feature
    BRAIN: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
    group_sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
    za = tl.zeros([FEATURES], dtype=tl.float32)
    zb, zc, zd = za, za, za
    sa, sb, sc, sd = _of_block(scales_ptr, start, width, num_features, features, GROUP, BITS)
    if zeros_ptr is not None:
        zeros_ptr += feature
        za, zb, zc, zd = _of_block(zeros_ptr, start, width, num_features, features, GROUP, BITS)
    for block in range(start, stop):
        words = tl.load(words_ptr + (block * tl.cast(num_features, tl.int64) + feature) * 16 + word_places)
        if GROUP:
            next_sa, next_sb, next_sc, next_sd = _of_block(
                scales_ptr, block + 1, width, num_features, features, GROUP, BITS
            )
            if zeros_ptr is not None:
                next_za, next_zb, next_zc, next_zd = _of_block(
                    zeros_ptr, block + 1, width, num_features, features, GROUP, BITS
                )
        for s in tl.static_range(16 // BITS):
            column = block * (512 // BITS) + 32 * s
            if EVEN:
                x = tl.load(x_ptr + column + x_places, mask=inside, other=0.0)
            else:
                x = tl.load(x_ptr + column + x_places, mask=inside & (inner < width - column)[:, None], other=0.0)
            zero = _of_slice(za, zb, zc, zd, s)
            w = decode_slice(words, zero, s, zeros_ptr is not None, BITS, BRAIN, NVIDIA, FEATURES)
            if x.dtype == tl.float32:
                w = w.to(tl.float32)
            if GROUP:
                group_sums = dot(w, x, group_sums)
                if (s + 1) * 32 % GROUP == 0 or s + 1 == 16 // BITS:
                    sums += group_sums * _of_slice(sa, sb, sc, sd, s)[:, None]
                    group_sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
            else:
                sums = dot(w, x, sums)
        if GROUP:
            sa, sb, sc, sd = next_sa, next_sb, next_sc, next_sd
            if zeros_ptr is not None:
                za, zb, zc, zd = next_za, next_zb, next_zc, next_zd
    if not GROUP:
        sums *= sa[:, None]
    return sums


@triton.jit
def weight_only_kernel(
    x_ptr,
    gate_words_ptr,
    gate_scales_ptr,
    gate_zeros_ptr,
    gate_bias_ptr,
    up_words_ptr,
    up_scales_ptr,
    up_zeros_ptr,
    up_bias_ptr,
    y_ptr,
    parts_ptr,
    counter_ptr,
    num_rows,
    num_features,
    width,
    limit,
    EVEN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NVIDIA: tl.constexpr,
    EARLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of y, or one part of its sums. Tiles of the same features follow each other, to share the weight."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row_tiles = tl.cdiv(num_rows, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    feature = tl.program_id(0) // row_tiles * FEATURES
    split = tl.program_id(1)
    blocks = tl.cdiv(width, 512 // BITS)
    each = tl.cdiv(blocks, SPLITS)
    start = split * each
    stop = tl.minimum(start + each, blocks)
    up = _accumulate(
        up_words_ptr, up_scales_ptr, up_zeros_ptr, x_ptr, row, feature, start, stop, num_rows, num_features, width,
        EVEN, BITS, GROUP, NVIDIA, FEATURES, ROWS,
    )  # fmt: skip
    gate = up
    if gate_words_ptr is not None:
        gate = _accumulate(
            gate_words_ptr, gate_scales_ptr, gate_zeros_ptr, x_ptr, row, feature, start, stop, num_rows, num_features,
            width, EVEN, BITS, GROUP, NVIDIA, FEATURES, ROWS,
        )  # fmt: skip
    end_tile(
        gate, up, y_ptr, parts_ptr, counter_ptr, gate_bias_ptr, up_bias_ptr, row, feature,
        tl.cast(num_rows, tl.int64) * num_features, num_rows, num_features, limit, gate_words_ptr is not None,
        ACTIVATION, SPLITS, FEATURES, ROWS,
    )  # fmt: skip


# --- configurations ---------------------------------------------------------------------------------------------------

# Programs wanted for each multiprocessor where the weight is split, and pieces of K that a part has at least: enough
# bytes on the way to keep memory busy, and few enough parts that adding them up costs little.
_PROGRAMS_PER_SM = 4
_FEWEST_PIECES = 4
_MOST_SPLITS = 16


def splits_for(tiles: int, pieces: int, num_rows: int, row_bytes: int, target: Target) -> int:
    """Over how many programs each tile's K is split: a power of two.

    Once every multiprocessor has a program, a split must not make the parts (written and read, 8 bytes a number) more
    than half of the weight (`row_bytes` for each feature).
    """
    splits = 1
    while 2 * splits <= _MOST_SPLITS and 2 * splits * _FEWEST_PIECES <= pieces:
        programs = 2 * splits * tiles
        costly = 2 * splits * num_rows * 8 > row_bytes // 2
        if programs > _PROGRAMS_PER_SM * target.num_sms or (programs > target.num_sms and costly):
            break
        splits *= 2
    return splits


def shared_estimate(config: Config, bits: int, dtype: torch.dtype, target: Target) -> int:
    """Bytes of shared memory that the pipelined loop holds at most: a block of words and its rows in every stage."""
    stage = config.blocks["FEATURES"] * WORDS * 4 + config.blocks["ROWS"] * block_size(bits) * dtype.itemsize
    return stage * (config.num_stages - target.is_amd)


def _config(
    shape: Shape, dtype: torch.dtype, target: Target, blocks: tuple[int, int], warps: int, stages: int
) -> Config:
    """With as many of the `stages` as fit in shared memory beside 16 KiB for the epilogue."""
    features, rows = blocks
    bits = shape["exact_bits"]
    tiles = ceil_div(shape["N"], features) * ceil_div(shape["M"], rows)
    pieces = ceil_div(shape["K"], block_size(bits))
    splits = splits_for(tiles, pieces, shape["M"], shape["K"] * bits // 8, target)
    sizes = {"FEATURES": features, "ROWS": rows, "SPLITS": splits}
    config = Config(sizes, warps, 2 if target.is_amd else stages)
    while config.num_stages > 1 and shared_estimate(config, bits, dtype, target) > target.shared_bytes - 16 * 1024:
        config = Config(sizes, warps, config.num_stages - 1)
    return config


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        splits = 2 if shape["M"] <= 16 and shape["K"] > block_size(shape["exact_bits"]) else 1
        return Config({"FEATURES": 16, "ROWS": 16, "SPLITS": splits})
    rows = max(16, next_power_of_2(min(shape["M"], 128)))
    if dtype == torch.float32:
        return _config(shape, dtype, target, (32, min(rows, 32)), 4, 2)
    if rows <= 64:
        # Wide tiles read x less often. A small weight has too few of them, and two sums of 128 x 64 are too many.
        wide = shape["N"] >= 2048 and rows * shape["exact_products"] <= 64
        return _config(shape, dtype, target, (128 if wide else 64, rows), 4, 3)
    # 128 x 128 is more than a program of sm_100 can hold beside the decoded weight: Triton 3.7 then makes an empty
    # kernel of it, without a word.
    return _config(shape, dtype, target, (128 if target.arch in ("sm_80", "sm_90") else 64, 128), 8, 3)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    fewest = max(16, next_power_of_2(min(shape["M"], 128)))
    most = 64 * 128 if dtype == torch.float32 or target.arch not in ("sm_80", "sm_90") else 128 * 128
    found = [
        _config(shape, dtype, target, (features, rows), warps, stages)
        for features in (32, 64, 128)
        for rows in (fewest // 2, fewest)
        for warps, stages in ((4, 3), (4, 4), (8, 3))
        if rows >= 16 and features * rows <= min(most, 64 * 32 * warps)
    ]
    if shape["M"] <= 64:
        found = [
            Config({**config.blocks, "SPLITS": splits}, config.num_warps, config.num_stages)
            for config in found
            for splits in (1, 2, 4, 8, 16)
        ]
    return found


WEIGHT_ONLY = Tunable("weight_only_matmul", _rule, _candidates)


# --- launcher ---------------------------------------------------------------------------------------------------------


def launch_weight_only(
    x_MK: Tensor,
    gate: Packed | None,
    up: Packed,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    bits: int,
    activation: str,
    limit: float | None,
) -> Tensor:
    """y_MN, for x contiguous and K > 0; with a gate both weights have the same bits, groups and shape."""
    num_rows, width = x_MK.shape
    words, scales_GN, zeros_GN = up
    num_features = scales_GN.shape[1]
    gate_words, gate_scales, gate_zeros = gate or (None, None, None)
    shape = {"M": num_rows, "N": num_features, "K": width, "exact_bits": bits, "exact_products": 1 + (gate is not None)}
    target = target_of(x_MK)
    config = WEIGHT_ONLY.pick(x_MK.dtype, target, **shape)
    splits = config.blocks["SPLITS"]
    blocks = config.blocks
    tiles = ceil_div(num_rows, blocks["ROWS"]) * ceil_div(num_features, blocks["FEATURES"])
    y_MN = x_MK.new_empty(num_rows, num_features, dtype=result_dtype(x_MK.dtype))
    parts = counter = None
    if splits > 1:
        parts = x_MK.new_empty(shape["exact_products"], splits, num_rows, num_features, dtype=torch.float32)
        counter = counters(x_MK, tiles)
    arguments = {
        "x_ptr": x_MK,
        "gate_words_ptr": gate_words,
        "gate_scales_ptr": gate_scales,
        "gate_zeros_ptr": gate_zeros,
        "gate_bias_ptr": gate_bias,
        "up_words_ptr": words,
        "up_scales_ptr": scales_GN,
        "up_zeros_ptr": zeros_GN,
        "up_bias_ptr": up_bias,
        "y_ptr": y_MN,
        "parts_ptr": parts,
        "counter_ptr": counter,
        "num_rows": num_rows,
        "num_features": num_features,
        "width": width,
        "limit": limit,
        "EVEN": width % block_size(bits) == 0,
        "BITS": bits,
        "GROUP": group_constant(scales_GN, width),
        "NVIDIA": target.is_nvidia and x_MK.dtype != torch.float32,
        "EARLY": target.starts_early and parts is not None and counter is None,
        "ACTIVATION": activation,
    }
    launch(weight_only_kernel, (tiles, splits), config, arguments)
    if parts is not None and counter is None:
        launch_combine(parts, y_MN, gate_bias, up_bias, activation, limit)
    return rounded(y_MN, x_MK.dtype)
