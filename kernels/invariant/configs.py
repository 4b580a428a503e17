"""Tiles of the batch-invariant product: which may stand for each other, and which of them a shape takes.

Tiles of one target and dtype differ in nothing that decides the bits of a number (`kernel.py`): the same BLOCK_K, the
same kind of matrix instruction. So a decoding step can take a lower tile than the prompt did.
"""

from __future__ import annotations

import torch

from trine.kernels.launch import ceil_div
from trine.kernels.target import Target
from trine.kernels.tuning import Config, Shape, Tunable

# Rows, columns, warps, stages; large ones first.
Tile = tuple[int, int, int, int]

# wgmma has 64 rows and four warps: a tile of fewer rows, or of fewer for four warps, would take an older instruction.
_HOPPER: tuple[Tile, ...] = ((128, 256, 8, 4), (128, 128, 8, 4), (64, 128, 4, 4), (64, 64, 4, 6), (64, 32, 4, 6))
# tcgen05 has 64 or 128 rows: only the latter.
_BLACKWELL: tuple[Tile, ...] = ((128, 256, 8, 3), (128, 128, 8, 4), (128, 64, 8, 4))
# m16n8k16 is the only instruction there is.
_AMPERE: tuple[Tile, ...] = ((128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (32, 64, 4, 5), (16, 64, 4, 5))
# 32 x 32 for each of four or eight warps.
_AMD: tuple[Tile, ...] = ((256, 128, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2))
# Multiplied without tensor cores, but on AMD, whose matrix instructions know fp32.
_SINGLE: tuple[Tile, ...] = ((64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 4, 3))
_SINGLE_AMD: tuple[Tile, ...] = ((64, 64, 4, 2),)
_INTERPRETER: tuple[Tile, ...] = ((16, 32, 4, 2), (16, 16, 4, 2))


def tiles_for(dtype: torch.dtype, target: Target) -> tuple[Tile, ...]:
    """All tiles that give the same bits on this target."""
    if target.interpreted:
        return _INTERPRETER
    if dtype == torch.float32:
        return _SINGLE_AMD if target.is_amd else _SINGLE
    if target.is_amd:
        return _AMD
    # sm_100 to sm_103 have tcgen05; sm_120 has the instructions of sm_80.
    if target.arch.startswith("sm_10"):
        return _BLACKWELL
    return _HOPPER if target.is_hopper else _AMPERE


def block_k(dtype: torch.dtype, target: Target) -> int:
    """How many numbers of K a piece has: one size for each dtype and target."""
    if target.interpreted:
        return 16
    return 32 if dtype == torch.float32 or target.is_amd else 64


def shared_estimate(config: Config, dtype: torch.dtype, target: Target) -> int:
    """Bytes of shared memory of the loop, and of half a tile of the result on its way out."""
    blocks = config.blocks
    loop = (
        (config.num_stages - target.is_amd) * (blocks["ROWS"] + blocks["COLUMNS"]) * blocks["BLOCK_K"] * dtype.itemsize
    )
    return loop + blocks["ROWS"] * blocks["COLUMNS"] * dtype.itemsize // 2


def _config(tile: Tile, dtype: torch.dtype, target: Target, group: int = 8) -> Config:
    rows, columns, warps, stages = tile
    sizes = {"ROWS": rows, "COLUMNS": columns, "BLOCK_K": block_k(dtype, target), "GROUP": group}
    config = Config(sizes, warps, stages)
    while config.num_stages > 2 and shared_estimate(config, dtype, target) > target.shared_bytes:
        config = Config(sizes, warps, config.num_stages - 1)
    return config


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    """The largest tile of which there are enough for three of four multiprocessors and no half stays empty."""
    tiles = tiles_for(dtype, target)
    for tile in tiles:
        rows, columns = tile[:2]
        empty = rows >= 2 * shape["M"] and rows > tiles[-1][0]
        count = ceil_div(shape["M"], rows) * ceil_div(shape["N"], columns)
        if not empty and 4 * count >= 3 * target.num_sms:
            return _config(tile, dtype, target)
    return _config(tiles[-1], dtype, target)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        _config((rows, columns, warps, tried), dtype, target, group)
        for rows, columns, warps, stages in tiles_for(dtype, target)
        for tried in ((stages,) if target.is_amd or target.interpreted else (stages - 1, stages, stages + 1))
        for group in (4, 8, 16)
    ]


MATMUL = Tunable("invariant_matmul", _rule, _candidates)


def programs(config: Config, tiles: int, dtype: torch.dtype, target: Target) -> int:
    """As many as the device holds at one time: by shared memory, and at most four for a multiprocessor."""
    each = 1 if target.interpreted else max(1, min(4, target.shared_bytes // shared_estimate(config, dtype, target)))
    return min(tiles, each * target.num_sms)
