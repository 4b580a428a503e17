"""Launch configurations of the attention kernels, by head size, dtype, target and what a call asks for."""

from __future__ import annotations

import torch

from trine.kernels.launch import next_power_of_2
from trine.kernels.target import Target
from trine.kernels.tuning import Config, Shape, Tunable


def _config(rows: int, keys: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": rows, "BLOCK_N": keys}, warps, stages)


def _forward_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    width = next_power_of_2(max(16, shape["exact_D"]))
    if target.interpreted:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16})
    if dtype == torch.float32:
        return Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4 if width <= 128 else 8, num_stages=1)
    if target.is_amd:
        return Config({"BLOCK_M": 128, "BLOCK_N": 64 if width <= 64 else 32}, num_warps=4, num_stages=1)
    if target.arch == "sm_90" or target.arch.startswith("sm_10"):
        sizes = {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)}
    else:
        sizes = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)}
    return _config(*sizes[max(64, width)])


def _keys_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    width = next_power_of_2(max(16, shape["exact_D"]))
    if target.interpreted:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16})
    if dtype == torch.float32:
        size = 32 if width <= 64 else 16
        return Config({"BLOCK_M": size, "BLOCK_N": size}, num_warps=4, num_stages=1)
    if target.is_amd:
        size = {64: 64, 128: 32, 256: 16}[max(64, width)]
        return Config({"BLOCK_M": size, "BLOCK_N": size}, num_warps=4, num_stages=1)
    if target.arch == "sm_90" or target.arch.startswith("sm_10"):
        sizes = {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 64, 8, 1)}
    else:
        sizes = {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)}
    return _config(*sizes[max(64, width)])


def _queries_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    config = _keys_rule(shape, dtype, target)
    return Config(
        {"BLOCK_M": config.blocks["BLOCK_N"], "BLOCK_N": config.blocks["BLOCK_M"]}, config.num_warps, config.num_stages
    )


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [
        _config(rows, keys, warps, stages)
        for rows in (32, 64, 128)
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]


def _prepare_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    return Config({"BLOCK_M": 16 if target.interpreted else 64}, num_warps=4)


def _bias_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    size = 16 if target.interpreted or shape["exact_D"] > 128 else 32
    return Config({"BLOCK_M": size}, num_warps=4, num_stages=1)


FORWARD = Tunable("attention_forward", _forward_rule, _candidates)
KEYS = Tunable("attention_backward_keys", _keys_rule, _candidates)
QUERIES = Tunable("attention_backward_queries", _queries_rule, _candidates)
PREPARE = Tunable("attention_backward_prepare", _prepare_rule, lambda *_: [])
BIAS = Tunable("attention_backward_bias", _bias_rule, lambda *_: [])
