"""Launch configurations of the grouped quantized products: pure functions of shape, dtype and target.

A shape is P (pairs of token and slot), E (experts), N (features), K (inner size), the bits of a code, the numbers that
share a scale (0: a whole row) and the number of products. Tiles of rows cannot span experts, so their size follows the
rows that an expert has on average.
"""

from __future__ import annotations

import torch

from trine.kernels.launch import ceil_div, next_power_of_2
from trine.kernels.quantized.packing import block_size
from trine.kernels.quantized.weight_only import shared_estimate, splits_for
from trine.kernels.target import Target
from trine.kernels.tuning import Config, Shape, Tunable

# Shared memory left to the epilogue.
_EPILOGUE_BYTES = 16 * 1024


def _config(
    shape: Shape, dtype: torch.dtype, target: Target, blocks: tuple[int, int], warps: int, stages: int
) -> Config:
    """With as many of the `stages` as fit in shared memory."""
    features, rows = blocks
    bits = shape["exact_bits"]
    sizes = {"FEATURES": features, "ROWS": rows, "TILES": 8, "SPLITS": _splits(shape, features, rows, target)}
    config = Config(sizes, warps, 2 if target.is_amd else stages)
    available = target.shared_bytes - _EPILOGUE_BYTES
    while config.num_stages > 1 and shared_estimate(config, bits, dtype, target) > available:
        config = Config(sizes, warps, config.num_stages - 1)
    return config


def _splits(shape: Shape, features: int, rows: int, target: Target) -> int:
    """As for a product of the rows of one expert, of which as many run beside each other as have any."""
    experts = max(1, min(shape["E"], shape["P"]))
    per_expert = ceil_div(shape["P"], experts)
    tiles = experts * ceil_div(per_expert, rows) * ceil_div(shape["N"], features)
    pieces = ceil_div(shape["K"], block_size(shape["exact_bits"]))
    return splits_for(tiles, pieces, per_expert, shape["K"] * shape["exact_bits"] // 8, target)


def _rows(shape: Shape) -> int:
    return max(16, next_power_of_2(min(ceil_div(shape["P"], shape["E"]), 128)))


def _crowded(shape: Shape, target: Target) -> bool:
    """Whether scales of few numbers leave too few registers for 64 x 128 sums: they would be spilled."""
    return shape["exact_group"] in (32, 64) and target.arch == "sm_80"


def _roomy(shape: Shape, target: Target) -> bool:
    """Whether 128 x 128 sums fit in registers beside the decoded weight, and with a gate those of the other product."""
    single = shape["exact_products"] == 1
    return shape["exact_group"] not in (32, 64) and (target.is_hopper or (single and target.arch == "sm_80"))


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        splits = 2 if shape["P"] <= 16 and shape["K"] > block_size(shape["exact_bits"]) else 1
        return Config({"FEATURES": 16, "ROWS": 16, "TILES": 2, "SPLITS": splits})
    rows = _rows(shape)
    if dtype == torch.float32:
        side = min(rows, 32)
        return _config(shape, dtype, target, (side, side), 4, 2)
    if _crowded(shape, target):
        rows = min(rows, 64)
        warps, stages = (4, 3) if shape["exact_group"] == 32 else (8, 3) if rows == 64 else (4, 4)
        return _config(shape, dtype, target, (64, rows), warps, stages)
    if rows <= 64:
        return _config(shape, dtype, target, (64, rows), 8 if target.is_amd and shape["exact_group"] == 64 else 4, 4)
    return _config(shape, dtype, target, (128 if _roomy(shape, target) else 64, 128), 8, 3)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    most = 128 * 128 if dtype != torch.float32 and target.arch in ("sm_80", "sm_90") else 64 * 128
    most = 64 * 64 if _crowded(shape, target) else most
    found = [
        _config(shape, dtype, target, (features, rows), warps, stages)
        for features in (16, 32, 64, 128)
        for rows in (16, 32, 64, 128)
        for warps, stages in ((4, 3), (4, 5), (8, 3))
        if rows <= 2 * _rows(shape)
        and features * rows <= min(most, 64 * 32 * warps)
        and (features > 16 or dtype == torch.float32)
    ]
    if shape["P"] <= 64:
        found = [
            Config({**config.blocks, "SPLITS": splits}, config.num_warps, config.num_stages)
            for config in found
            for splits in (1, 2, 4, 8)
        ]
    return found


GROUPED = Tunable("grouped_weight_only", _rule, _candidates)
