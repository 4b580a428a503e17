"""Launch configurations of the attention kernels, by head size, dtype, target and what a call asks for.

Chosen from what the compiler reports for each target (`python -m trine.kernels.aot`): the largest tiles that spill no
register. Softcap or ALiBi, dropout, and a table of biases each need more registers than plain attention, masks none.
"""

from __future__ import annotations

import torch

from trine.kernels.launch import next_power_of_2
from trine.kernels.target import Target
from trine.kernels.tuning import Config, Shape, Tunable

# Queries, keys, warps, stages.
_Tile = tuple[int, int, int, int]
# By head size (padded): the tiles of plain attention, with softcap or ALiBi, with dropout, and with
# biases or dropout beside one of the first (`options.shape_of`).
_Table = dict[int, tuple[_Tile, _Tile, _Tile, _Tile]]

_FORWARD: dict[str, _Table] = {
    "hopper": {
        64: ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        256: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2)),
    },
    "ampere": {
        64: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        128: ((128, 64, 8, 3), (64, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "amd": {
        64: ((128, 32, 4, 1), (128, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
        128: ((128, 32, 4, 1), (128, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
        256: ((128, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    "single": {
        64: ((32, 32, 4, 1),) * 4,
        128: ((32, 32, 8, 1),) * 4,
        256: ((16, 16, 4, 1),) * 4,
    },
}
_KEYS: dict[str, _Table] = {
    "hopper": {
        64: ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2)),
        128: ((64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2)),
        256: ((32, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2), (32, 32, 8, 2)),
    },
    "ampere": {
        64: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        128: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        256: ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "amd": {
        64: ((32, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 4, 1),) * 4,
        256: ((16, 16, 4, 1),) * 4,
    },
    "single": {
        64: ((32, 32, 4, 1),) * 4,
        128: ((16, 32, 4, 1),) * 4,
        256: ((16, 16, 4, 1),) * 4,
    },
}
_QUERIES: dict[str, _Table] = {
    "hopper": {
        64: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "ampere": {
        64: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        128: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "amd": {
        64: ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
        128: ((32, 32, 4, 1),) * 4,
        256: ((16, 16, 4, 1),) * 4,
    },
    "single": {
        64: ((32, 32, 4, 1),) * 4,
        128: ((32, 16, 4, 1),) * 4,
        256: ((16, 16, 4, 1),) * 4,
    },
}


def _width(shape: Shape) -> int:
    return next_power_of_2(max(64, shape["exact_D"]))


def _config(tile: _Tile) -> Config:
    rows, keys, warps, stages = tile
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)


def _from_table(tables: dict[str, _Table], shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16})
    recent = target.arch == "sm_90" or target.arch.startswith("sm_10")
    kind = "single" if dtype == torch.float32 else "amd" if target.is_amd else "hopper" if recent else "ampere"
    return _config(tables[kind][_width(shape)][shape["exact_extra"]])


def _forward_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return _from_table(_FORWARD, shape, dtype, target)


def _keys_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return _from_table(_KEYS, shape, dtype, target)


def _queries_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return _from_table(_QUERIES, shape, dtype, target)


def _prepare_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return Config({"BLOCK_M": 16 if target.interpreted else max(16, 4096 // _width(shape))}, num_warps=4)


def _bias_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    small = target.interpreted or target.is_amd or dtype == torch.float32 or _width(shape) > 64
    return Config({"BLOCK_M": 16 if small else 32}, num_warps=4, num_stages=1)


# What tuning tries: (queries, keys) of the forward pass and of dQ; the other way round for dK and dV.
_SIZES = ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (64, 32), (32, 32))


def _fits(config: Config, shape: Shape, dtype: torch.dtype, target: Target, streamed: str) -> bool:
    """Whether shared memory holds the tiles: two that stay and two of every stage."""
    stays = sum(config.blocks.values()) - config.blocks[streamed]
    rows = 2 * stays + 2 * config.num_stages * config.blocks[streamed]
    return rows * _width(shape) * dtype.itemsize <= target.shared_bytes


def _candidates(shape: Shape, dtype: torch.dtype, target: Target, *, keys: bool) -> list[Config]:
    if dtype == torch.float32 or target.interpreted:
        return []
    sizes = [(b, a) if keys else (a, b) for a, b in _SIZES]
    tiles = ((*size, warps, stages) for size in sizes for warps in (4, 8) for stages in (1, 2, 3))
    streamed = "BLOCK_M" if keys else "BLOCK_N"
    return [config for config in map(_config, tiles) if _fits(config, shape, dtype, target, streamed)]


def _row_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return _candidates(shape, dtype, target, keys=False)


def _key_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return _candidates(shape, dtype, target, keys=True)


FORWARD = Tunable("attention_forward", _forward_rule, _row_candidates)
KEYS = Tunable("attention_backward_keys", _keys_rule, _key_candidates)
QUERIES = Tunable("attention_backward_queries", _queries_rule, _row_candidates)
PREPARE = Tunable("attention_backward_prepare", _prepare_rule, lambda *_: [])
BIAS = Tunable("attention_backward_bias", _bias_rule, lambda *_: [])
