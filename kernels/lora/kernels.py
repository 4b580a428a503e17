"""The Triton kernels of LoRA for several adapters in one batch: shrink to the rank, expand and add.

    shrink  h[s, r] = x[token of r, K_s] A[e, :, K_s]^T       K_s: part s of C
    expand  y[token of r] += scale[e] (sum over s of h[s, r]) B[e]^T

Rows stand in the order of their adapters (`moe/groups.py`), a program has a tile of rows of one adapter. Few tokens
are bound by reading A and B, and C is split over programs; expanding adds the parts up in their order, so there is no
third launch and no atomics, and the bits repeat.

Shapes: N tokens, E adapters, C inputs, F outputs, R rank, S parts. Operations: 2 N C R + 2 N R F. Bytes of b-byte
numbers: shrink b (N C + T R C) + 4 S N R, expand b (2 N F + T F R) + 4 S N R, T being the adapters present; what
several tiles of one adapter read again comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot, narrow
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.lora.tiles import Tiles
from trine.kernels.moe.product import source_rows
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    token_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_adapters,
    num_tokens,
    width,
    x_stride,
    a_stride,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One part of h of one tile. RANKS: the rank rounded up to what tensor cores take."""
    tile, split = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(tile_ptr + tile)
    if adapter >= num_adapters:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(offset_ptr + adapter + 1)
    tokens = source_rows(token_ptr, row, end, ROWS, 1)
    inner, ranks = tl.arange(0, BLOCK_K), tl.arange(0, RANKS)
    each = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLITS) * BLOCK_K
    first = split * each
    last = tl.minimum(first + each, width)
    x_places = tokens[:, None] * x_stride + inner[None, :]
    # What hangs over the rank repeats the last row of A, and is not stored.
    a_places = tl.minimum(ranks, RANK - 1)[None, :] * width + inner[:, None]
    a_ptr += adapter.to(tl.int64) * a_stride
    h = tl.zeros([ROWS, RANKS], dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptr + start + x_places)
            a = tl.load(a_ptr + start + a_places)
        else:
            x = tl.load(x_ptr + start + x_places, mask=inner[None, :] < width - start, other=0.0)
            a = tl.load(a_ptr + start + a_places, mask=inner[:, None] < width - start, other=0.0)
        h = dot(x, a, h)
    rows = tl.arange(0, ROWS)
    h_ptr += (split * tl.cast(num_tokens, tl.int64) + row) * RANK
    inside = (rows[:, None] < end - row) & (ranks[None, :] < RANK)
    tl.store(h_ptr + rows[:, None] * RANK + ranks[None, :], h, mask=inside)


@triton.jit
def expand_kernel(
    h_ptr,
    b_ptr,
    scale_ptr,
    y_ptr,
    token_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_adapters,
    num_tokens,
    num_columns,
    y_stride,
    b_stride,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of COLUMNS columns of y of one tile of rows."""
    tile = tl.program_id(0)
    adapter = tl.load(tile_ptr + tile)
    if adapter >= num_adapters:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(offset_ptr + adapter + 1)
    rows, ranks, columns = tl.arange(0, ROWS), tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    present = rows[:, None] < end - row
    h_places = row.to(tl.int64) * RANK + rows[:, None] * RANK + ranks[None, :]
    h = tl.zeros([ROWS, RANKS], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part_ptr = h_ptr + split * tl.cast(num_tokens, tl.int64) * RANK
        h += tl.load(part_ptr + h_places, mask=present & (ranks[None, :] < RANK), other=0.0)
    scale = tl.load(scale_ptr + adapter)
    y_places = source_rows(token_ptr, row, end, ROWS, 1)[:, None] * y_stride + columns[None, :]
    b_places = columns[None, :] * RANK + ranks[:, None]
    b_ptr += adapter.to(tl.int64) * b_stride
    first = tl.program_id(1) * (BLOCKS * COLUMNS)
    for column in range(first, tl.minimum(first + BLOCKS * COLUMNS, num_columns), COLUMNS):
        left = num_columns - column
        if RANK == RANKS and EVEN:
            b = tl.load(b_ptr + tl.cast(column, tl.int64) * RANK + b_places)
        else:
            wanted = (ranks[:, None] < RANK) & (columns[None, :] < left)
            b = tl.load(b_ptr + tl.cast(column, tl.int64) * RANK + b_places, mask=wanted, other=0.0)
        added = dot(narrow(h, b), b, tl.zeros([ROWS, COLUMNS], dtype=tl.float32))
        inside = present if EVEN else present & (columns[None, :] < left)
        y = tl.load(y_ptr + column + y_places, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + column + y_places, (y + scale * added).to(y_ptr.dtype.element_ty), mask=inside)


# --- configurations ---------------------------------------------------------------------------------------------------

# Programs wanted for each multiprocessor where there are few tiles: enough bytes on the way to keep memory busy.
_PROGRAMS_PER_SM = 2
_MOST_SPLITS = 16
# Blocks of columns for a program: enough that reading h costs little, few enough that programs end together.
_MOST_BLOCKS = 8


def _shrink_config(shape: Shape, target: Target, inner: int, splits: int, warps: int, stages: int) -> Config:
    """No part without a piece of C, and no more parts than a piece each."""
    splits = min(splits, next_power_of_2(ceil_div(shape["C"], inner)))
    return Config({"BLOCK_K": inner, "SPLITS": splits}, warps, 2 if target.is_amd else stages)


def _splits(shape: Shape, inner: int, target: Target) -> int:
    """A power of two: until every multiprocessor has its programs, and at least two pieces for each part."""
    splits = 1
    while (
        splits < _MOST_SPLITS
        and 2 * splits * shape["M"] <= _PROGRAMS_PER_SM * target.num_sms
        and 4 * splits * inner <= shape["C"]
    ):
        splits *= 2
    return splits


def _shrink_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"BLOCK_K": 16, "SPLITS": 2 if shape["C"] > 16 else 1})
    large = shape["exact_rows"] + next_power_of_2(shape["exact_R"]) > 128
    inner = (32 if large else 64) if dtype.itemsize == 4 or target.is_amd else (64 if large else 128)
    return _shrink_config(shape, target, inner, _splits(shape, inner, target), 4, 3)


def _shrink_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    rows = shape["exact_rows"] + max(16, next_power_of_2(shape["exact_R"]))
    return [
        _shrink_config(shape, target, inner, splits, warps, stages)
        for inner in (32, 64, 128, 256)
        for splits in (1, 2, 4, 8, 16)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if stages * rows * inner * dtype.itemsize <= target.shared_bytes - 16 * 1024
    ]


def _expand_config(shape: Shape, target: Target, columns: int, warps: int, stages: int, per_sm: int) -> Config:
    """As many blocks of columns for a program as leave `per_sm` programs for each multiprocessor."""
    programs = max(1, per_sm * target.num_sms // shape["M"])
    blocks = next_power_of_2(ceil_div(ceil_div(shape["F"], columns), programs))
    sizes = {"COLUMNS": columns, "BLOCKS": min(blocks, _MOST_BLOCKS)}
    return Config(sizes, warps, 2 if target.is_amd else stages)


def _expand_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"COLUMNS": 16, "BLOCKS": 2})
    # h of the tile stays in registers.
    large = next_power_of_2(shape["exact_R"]) * dtype.itemsize > 128
    return _expand_config(
        shape, target, (32 if large else 64) if dtype.itemsize == 4 else (64 if large else 128), 4, 3, 4
    )


def _expand_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    ranks = max(16, next_power_of_2(shape["exact_R"]))
    return [
        _expand_config(shape, target, columns, warps, stages, per_sm)
        for columns in (32, 64, 128, 256)
        for warps in (4, 8)
        for stages in (2, 3)
        for per_sm in (2, 4, 8)
        if shape["exact_rows"] * (columns + ranks) <= 128 * 32 * warps
        and stages * ranks * columns * dtype.itemsize <= target.shared_bytes // 2
    ]


SHRINK = Tunable("lora_shrink", _shrink_rule, _shrink_candidates)
EXPAND = Tunable("lora_expand", _expand_rule, _expand_candidates)


# --- launchers --------------------------------------------------------------------------------------------------------


def _shared(tiles: Tiles, rank: int) -> dict[str, object]:
    return {
        "token_ptr": tiles.token_N,
        "offset_ptr": tiles.offset,
        "tile_ptr": tiles.tiles_2M,
        "num_tiles": tiles.tiles_2M.shape[1],
        "num_adapters": tiles.num_adapters,
        "num_tokens": len(tiles.token_N),
        "RANK": rank,
        "RANKS": max(16, next_power_of_2(rank)),
        "ROWS": tiles.rows,
    }


def _sizes(tiles: Tiles, rank: int) -> dict[str, int]:
    return {"M": tiles.tiles_2M.shape[1], "exact_R": rank, "exact_rows": tiles.rows}


def launch_shrink(x_NC: Tensor, a_ERC: Tensor, tiles: Tiles) -> Tensor:
    """fp32 h_SNR in the order of the adapters; what belongs to no adapter is left as it is found in memory.

    Rows of x and matrices of adapters may be far apart, but are contiguous each.
    """
    num_tokens, width = x_NC.shape
    rank = a_ERC.shape[1]
    config = SHRINK.pick(x_NC.dtype, target_of(x_NC), C=width, **_sizes(tiles, rank))
    h_SNR = x_NC.new_empty(config.blocks["SPLITS"], num_tokens, rank, dtype=torch.float32)
    arguments = {
        "x_ptr": x_NC,
        "a_ptr": a_ERC,
        "h_ptr": h_SNR,
        **_shared(tiles, rank),
        "width": width,
        "x_stride": x_NC.stride(0),
        "a_stride": a_ERC.stride(0),
        "EVEN": width % config.blocks["BLOCK_K"] == 0,
    }
    launch(shrink_kernel, (tiles.tiles_2M.shape[1], config.blocks["SPLITS"]), config, arguments)
    return h_SNR


def launch_expand(h_SNR: Tensor, b_EFR: Tensor, scales_E: Tensor, y_NF: Tensor, tiles: Tiles) -> None:
    """Add to y_NF, whose rows are contiguous each."""
    num_columns, rank = b_EFR.shape[1:]
    config = EXPAND.pick(y_NF.dtype, target_of(y_NF), F=num_columns, **_sizes(tiles, rank))
    found = y_NF.to(result_dtype(y_NF.dtype))
    arguments = {
        "h_ptr": h_SNR,
        "b_ptr": b_EFR,
        "scale_ptr": scales_E,
        "y_ptr": found,
        **_shared(tiles, rank),
        "num_columns": num_columns,
        "y_stride": found.stride(0),
        "b_stride": b_EFR.stride(0),
        "SPLITS": h_SNR.shape[0],
        "EVEN": num_columns % config.blocks["COLUMNS"] == 0,
    }
    parts = ceil_div(num_columns, config.blocks["COLUMNS"] * config.blocks["BLOCKS"])
    launch(expand_kernel, (tiles.tiles_2M.shape[1], parts), config, arguments)
    if found is not y_NF:
        y_NF.copy_(rounded(found, y_NF.dtype))
