"""What keys and values are kept in: as asked for, else as the checkpoint asks (`kv_cache_scheme`), else as computed."""

from __future__ import annotations

import torch

from trine.engine.errors import UsageError
from trine.engine.generate.records import EngineConfig
from trine.engine.log import say_once
from trine.engine.model.transformer import Transformer
from trine.kernels.target import target_of

_FIRST_FP8 = 89


def cache_dtype(model: Transformer, config: EngineConfig, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cache. What a checkpoint asks for and cannot be had is said, and left.

    Raises `UsageError` for fp8 that was asked for by `config` where there is none.
    """
    asked = config.kv_dtype or model.kv_dtype
    if asked is None:
        return compute_dtype
    reason = _why_no_fp8(model.device) if asked == torch.float8_e4m3fn else None
    if config.kv_dtype is not None:
        if reason is not None:
            raise UsageError(f"kv_dtype is {_name(asked)}, and {reason}; use int8 there, or leave it out")
        return asked
    if reason is None and config.deterministic:
        reason = "the deterministic mode reads keys as they are computed"
    if reason is None:
        return asked
    say_once(f"the checkpoint asks for a key/value cache in {_name(asked)}: {reason}; it is {_name(compute_dtype)}")
    return compute_dtype


def _why_no_fp8(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "a CPU has no caches in fp8"
    target = target_of(torch.empty(0, device=device))
    if target.is_amd or int(target.arch.removeprefix("sm_")) < _FIRST_FP8:
        return f"{target.arch} has no caches in fp8"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
