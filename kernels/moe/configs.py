"""Launch configurations of the grouped matrix products: pure functions of shape, dtype and target.

A shape is P (pairs of token and slot), E (experts), C (inner size) and F (columns). Tiles of rows cannot span experts,
so their height follows the rows that an expert has on average.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from trine.kernels.launch import ceil_div, next_power_of_2
from trine.kernels.target import Target
from trine.kernels.tuning import Config, Shape, Tunable

# Shared memory left to the epilogue.
_EPILOGUE_BYTES = 16 * 1024
_INNER, _COLUMNS = ("BLOCK_K", "COLUMNS")


def shared_estimate(config: Config, dtype: torch.dtype, products: int) -> int:
    """Bytes of shared memory that the pipelined loop holds at most, with `products` weights beside one left operand."""
    blocks = config.blocks
    return config.num_stages * (blocks["ROWS"] + products * blocks[_COLUMNS]) * blocks[_INNER] * dtype.itemsize


def _config(target: Target, dtype: torch.dtype, products: int, blocks: tuple[int, int, int], warps: int) -> Config:
    """With as many stages, up to four, as fit in shared memory."""
    rows, columns, inner = blocks
    config = Config({"ROWS": rows, _COLUMNS: columns, _INNER: inner, "GROUP": 8}, warps, 1)
    stages = (target.shared_bytes - _EPILOGUE_BYTES) // shared_estimate(config, dtype, products)
    return Config(config.blocks, warps, max(1, min(2 if target.is_amd else 4, stages)))


def _fewest_rows(target: Target) -> int:
    """wgmma and tcgen05 want 64 rows; fewer tokens are bound by reading the weights anyway."""
    return 64 if target.arch in ("sm_90", "sm_100") else 16


def _rule(shape: Shape, dtype: torch.dtype, target: Target, *, products: int, backward: bool) -> Config:
    if target.interpreted:
        return Config({"ROWS": 16, _COLUMNS: 16, _INNER: 16, "GROUP": 2})
    per_expert = ceil_div(shape["P"], shape["E"])
    rows = max(_fewest_rows(target), next_power_of_2(min(per_expert, 128)))
    if dtype.itemsize == 4:
        return _config(target, dtype, products, (min(rows, 64), 64, 32), 4 if products == 1 else 8)
    if target.is_amd:
        return _config(target, dtype, products, (rows, 64 if products == 2 else 128, 32), 4 if rows < 64 else 8)
    if rows < 128:
        return _config(target, dtype, products, (rows, 64, 64), 4)
    wide = target.arch == "sm_80" or backward
    if products == 2:
        return _config(target, dtype, products, (128, 64 if wide else 128, 64), 8)
    return _config(target, dtype, products, (128, 128 if wide else 256, 64), 8)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target, *, products: int) -> list[Config]:
    inner = 32 if dtype.itemsize == 4 or target.is_amd else 64
    return [
        _config(target, dtype, products, (rows, columns, inner), warps)
        for rows in (16, 32, 64, 128, 256)
        for columns in (64, 128, 256)
        for warps in (4, 8)
        if rows <= 2 * max(16, ceil_div(shape["P"], shape["E"]))
        # No more fp32 accumulators than half of the registers hold, no fewer than a tensor core wants.
        and 8 * 32 * warps <= rows * columns * products <= 128 * 32 * warps
    ]


def _tunable(name: str, products: int, backward: bool) -> Tunable:
    rule: Callable[[Shape, torch.dtype, Target], Config] = partial(_rule, products=products, backward=backward)
    return Tunable(name, rule, partial(_candidates, products=products))


GATED_FORWARD = _tunable("moe_gated_forward", 2, False)
GATED_BACKWARD = _tunable("moe_gated_backward", 2, True)
# By whether the weights are read transposed, as the gradient of the input needs them.
MATMUL = {
    False: _tunable("grouped_matmul", 1, False),
    True: _tunable("grouped_matmul_transposed", 1, False),
}


def weight_shared_estimate(config: Config, dtype: torch.dtype, gathered: bool) -> int:
    """As `shared_estimate` for the gradient of a weight.

    Where rows are fetched through the list of pairs, the compiler keeps half of the stages for the indices: it waits
    (stages - 2) / 2 steps, rounded up, between the load of an index and that of its row, and as long after that.
    """
    blocks = config.blocks
    buffers = 1 + ceil_div(config.num_stages - 2, 2) if gathered else config.num_stages
    return buffers * (blocks["LEFT"] + blocks["RIGHT"]) * blocks["ROWS"] * dtype.itemsize


def _weight_config(left: int, right: int, rows: int, warps: int, stages: int) -> Config:
    return Config({"LEFT": left, "RIGHT": right, "ROWS": rows, "GROUP": 8}, warps, stages)


def _weight_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    """A tile of LEFT x RIGHT numbers of a weight's gradient, ROWS rows of its expert at a time."""
    gathered = shape["exact_gathered"]
    if target.interpreted:
        return Config({"LEFT": 16, "RIGHT": 16, "ROWS": 16, "GROUP": 2})
    if dtype.itemsize == 4:
        return _weight_config(64, 64, 32, 4, 5 if gathered and not target.is_amd else 2)
    if target.is_amd:
        return _weight_config(128, 128, 32, 8, 3 if gathered else 2)
    if target.arch == "sm_80":
        return _weight_config(128, 128, 64, 8, 5 if gathered else 3)
    return _weight_config(128, 256, 64, 8, 5 if gathered else 4)


def _weight_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    inner = 32 if dtype.itemsize == 4 or target.is_amd else 64
    gathered = bool(shape["exact_gathered"])
    tried = [
        _weight_config(left, right, inner, warps, stages)
        for left in (64, 128)
        for right in (64, 128, 256)
        for warps in (4, 8)
        for stages in ((3, 5, 7) if gathered else (2, 3, 4))
        if left * right <= 128 * 32 * warps
    ]
    limit = target.shared_bytes - _EPILOGUE_BYTES
    return [config for config in tried if weight_shared_estimate(config, dtype, gathered) <= limit]


WEIGHT_GRADIENT = Tunable("grouped_weight_gradient", _weight_rule, _weight_candidates)
