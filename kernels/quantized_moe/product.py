"""Grouped products with quantized weights: for each row r of an expert e, its activation or gate in the epilogue.

    y[r] = x[row of r] W[e]^T + b[e]        y[r] = act(gate + bg[e]) * (up + bu[e])

As `quantized/weight_only.py` with the tiles of `moe/groups.py`: a program owns a tile of [features, rows] of one
expert. Slices of 32 codes are decoded in registers and multiplied with rows fetched through the list of pairs; the fp32
sums of each group are multiplied by its scale. So weights are never rounded, and nothing is written between the codes
and y. What hangs over the end of an expert repeats its last row.

Few pairs leave many multiprocessors without a tile: there K is split over programs, and the last program of a tile adds
up the parts (`last_program.py`), or `split.py` does.

Shapes: P pairs, E experts, K input features, N output features. Bytes, few rows: the codes and scales of the experts
that have any, N K bits / 8 each. Operations: 2 P N K, twice that with a gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.last_program import counters
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.mlp.projection import _tile_of as tile_of
from trine.kernels.moe.groups import Groups, tile_list
from trine.kernels.moe.product import product_arguments, source_rows
from trine.kernels.quantized.epilogue import end_tile
from trine.kernels.quantized.packing import block_size
from trine.kernels.quantized_moe.configs import GROUPED
from trine.kernels.quantized_moe.decode import decode_codes, scale_of
from trine.kernels.quantized_moe.experts import KINDS
from trine.kernels.quantized_moe.split import launch_parts
from trine.kernels.target import target_of


class Experts(NamedTuple):
    """Words [E, B, N, 16], scales, zero points and bias [E, N] of one projection, contiguous; see `experts.py`."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None


@triton.jit
def _of_slice(ptr, column, width, stride, lines, GROUP: tl.constexpr):
    """Scales or zero points of the group of a column, fp32; past the end of a row those of the last group."""
    if GROUP:
        ptr += (tl.minimum(column, width - 1) // GROUP).to(tl.int64) * stride
    return scale_of(tl.load(ptr + lines))


@triton.jit
def _of_block(ptr, block, width, stride, lines, GROUP: tl.constexpr, BITS: tl.constexpr):
    """What the (at most four) slices of a block need of scales or zero points. Slices of one group share a load."""
    column = block * (512 // BITS)
    a = _of_slice(ptr, column, width, stride, lines, GROUP)
    b, c, d = a, a, a
    if GROUP == 32:
        b = _of_slice(ptr, column + 32, width, stride, lines, GROUP)
    if BITS == 4 and (GROUP == 32 or GROUP == 64):
        c = _of_slice(ptr, column + 64, width, stride, lines, GROUP)
        d = c
    if BITS == 4 and GROUP == 32:
        d = _of_slice(ptr, column + 96, width, stride, lines, GROUP)
    return a, b, c, d


@triton.jit
def _chosen(a, b, c, d, SLICE: tl.constexpr):
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
    sources,
    expert,
    feature,
    start,
    stop,
    num_features,
    width,
    num_groups,
    EVEN: tl.constexpr,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPREAD: tl.constexpr,
    NVIDIA: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums [FEATURES, ROWS] over the blocks start to stop; a tile over the edge repeats the last feature."""
    features = tl.minimum(feature + tl.arange(0, FEATURES), num_features - 1)
    inner = tl.arange(0, 32)
    word_places = features[:, None] * 16 + tl.arange(0, 16)[None, :]
    x_places = sources[None, :] * width + inner[:, None]
    words_ptr += expert.to(tl.int64) * tl.cdiv(width, 512 // BITS) * num_features * 16
    stride = tl.cdiv(num_features, SPREAD)
    lines = features // SPREAD
    scales_ptr += expert.to(tl.int64) * num_groups * stride
    BRAIN: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
    group_sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
    za = tl.zeros([FEATURES], dtype=tl.float32)
    zb, zc, zd = za, za, za
    sa, sb, sc, sd = _of_block(scales_ptr, start, width, stride, lines, GROUP, BITS)
    if zeros_ptr is not None:
        zeros_ptr += expert.to(tl.int64) * num_groups * stride
        za, zb, zc, zd = _of_block(zeros_ptr, start, width, stride, lines, GROUP, BITS)
    for block in range(start, stop):
        words = tl.load(words_ptr + block * tl.cast(num_features, tl.int64) * 16 + word_places)
        if GROUP:
            next_sa, next_sb, next_sc, next_sd = _of_block(scales_ptr, block + 1, width, stride, lines, GROUP, BITS)
            if zeros_ptr is not None:
                next_za, next_zb, next_zc, next_zd = _of_block(zeros_ptr, block + 1, width, stride, lines, GROUP, BITS)
        for s in tl.static_range(16 // BITS):
            column = block * (512 // BITS) + 32 * s
            if EVEN:
                x = tl.load(x_ptr + column + x_places)
            else:
                x = tl.load(x_ptr + column + x_places, mask=(inner < width - column)[:, None], other=0.0)
            zero = _chosen(za, zb, zc, zd, s)
            w = decode_codes(words, zero, s, zeros_ptr is not None, FLOAT, BITS, BRAIN, NVIDIA, FEATURES)
            if x.dtype == tl.float32:
                w = w.to(tl.float32)
            if GROUP:
                group_sums = dot(w, x, group_sums)
                if (s + 1) * 32 % GROUP == 0 or s + 1 == 16 // BITS:
                    sums += group_sums * _chosen(sa, sb, sc, sd, s)[:, None]
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
def grouped_weight_only_kernel(
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
    pair_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_experts,
    num_pairs,
    num_features,
    width,
    num_groups,
    limit,
    NUM_SLOTS: tl.constexpr,
    EVEN: tl.constexpr,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPREAD: tl.constexpr,
    NVIDIA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of y, or one part of its sums. Programs run in groups of TILES tiles of rows, features inside."""
    tile, feature = tile_of(tl.program_id(0), num_tiles, num_features, 1, FEATURES, TILES)
    expert = tl.load(tile_ptr + tile)
    if expert >= num_experts:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(offset_ptr + expert + 1)
    sources = source_rows(pair_ptr, row, end, ROWS, NUM_SLOTS)
    split = tl.program_id(1)
    blocks = tl.cdiv(width, 512 // BITS)
    each = tl.cdiv(blocks, SPLITS)
    start = split * each
    stop = tl.minimum(start + each, blocks)
    up = _accumulate(
        up_words_ptr, up_scales_ptr, up_zeros_ptr, x_ptr, sources, expert, feature, start, stop, num_features, width,
        num_groups, EVEN, FLOAT, BITS, GROUP, SPREAD, NVIDIA, FEATURES, ROWS,
    )  # fmt: skip
    gate = up
    if gate_words_ptr is not None:
        gate = _accumulate(
            gate_words_ptr, gate_scales_ptr, gate_zeros_ptr, x_ptr, sources, expert, feature, start, stop,
            num_features, width, num_groups, EVEN, FLOAT, BITS, GROUP, SPREAD, NVIDIA, FEATURES, ROWS,
        )  # fmt: skip
    if up_bias_ptr is not None:
        up_bias_ptr += expert * num_features
    if gate_bias_ptr is not None:
        gate_bias_ptr += expert * num_features
    end_tile(
        gate, up, y_ptr, parts_ptr, counter_ptr, gate_bias_ptr, up_bias_ptr, row, feature,
        tl.cast(num_pairs, tl.int64) * num_features, end, num_features, limit, gate_words_ptr is not None, ACTIVATION,
        SPLITS, FEATURES, ROWS,
    )  # fmt: skip


def launch_grouped(
    x: Tensor,
    gate: Experts | None,
    up: Experts,
    groups: Groups,
    kind: str,
    spread: int,
    activation: str,
    limit: float | None,
    tiles: dict[int, Tensor],
    *,
    gather: bool,
) -> Tensor:
    """y_PN in the dtype of x; the rows of no expert are left as they are found in memory.

    x is contiguous, [N, K] with `gather` (a row for each token) or [P, K] in grouped order. Both weights have one kind,
    shape and form of scales. `tiles` keeps the lists of tiles of these groups, by rows of a tile, for the next product.
    """
    num_pairs, width, num_features = len(groups.pair_P), x.shape[1], up.words.shape[2]
    bits, num_groups = KINDS[kind], up.scales.shape[1]
    products, group = 1 + (gate is not None), _group_constant(kind, num_groups, width, spread)
    sizes = {"P": num_pairs, "E": groups.num_experts, "N": num_features, "K": width}
    sizes |= {"exact_bits": bits, "exact_group": group, "exact_products": products}
    config = GROUPED.pick(x.dtype, target_of(x), **sizes)
    splits = config.blocks["SPLITS"]
    y_PN = x.new_empty(num_pairs, num_features, dtype=result_dtype(x.dtype))
    rows = config.blocks["ROWS"]
    tiles_2M = tiles[rows] = tiles[rows] if rows in tiles else tile_list(groups, rows)
    grid = (tiles_2M.shape[1] * ceil_div(num_features, config.blocks["FEATURES"]), splits)
    parts = counter = None
    if splits > 1:
        parts = x.new_empty(products, splits, num_pairs, num_features, dtype=torch.float32)
        counter = counters(x, grid[0])
    gate_words, gate_scales, gate_zeros, gate_bias = gate or (None,) * 4
    arguments = {
        "x_ptr": x,
        "gate_words_ptr": gate_words,
        "gate_scales_ptr": gate_scales,
        "gate_zeros_ptr": gate_zeros,
        "gate_bias_ptr": gate_bias,
        "up_words_ptr": up.words,
        "up_scales_ptr": up.scales,
        "up_zeros_ptr": up.zeros,
        "up_bias_ptr": up.bias,
        "y_ptr": y_PN,
        "parts_ptr": parts,
        "counter_ptr": counter,
        **product_arguments(groups, tiles_2M, gather),
        "num_pairs": num_pairs,
        "num_features": num_features,
        "width": width,
        "num_groups": num_groups,
        "limit": limit,
        "EVEN": width % block_size(bits) == 0,
        "FLOAT": kind in ("fp8", "mxfp4"),
        "BITS": bits,
        "GROUP": group,
        "SPREAD": spread,
        "NVIDIA": target_of(x).is_nvidia,
        "ACTIVATION": activation,
    }
    launch(grouped_weight_only_kernel, grid, config, arguments)
    if parts is not None and counter is None:
        launch_parts(parts, y_PN, groups, None if gate is None else gate.bias, up.bias, activation, limit)
    return rounded(y_PN, x.dtype)


def _group_constant(kind: str, num_groups: int, width: int, spread: int) -> int:
    """GROUP of the kernel: 0 where a row has one scale."""
    if kind == "mxfp4":
        return 32
    if num_groups == 1:
        return 0
    return spread if spread > 1 else width // num_groups
