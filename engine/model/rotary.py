"""The frequencies of rotary positions, with the scalings that stretch a context.

Source: Su et al. 2021 (arXiv 2104.09864); linear: Chen et al. 2023 (arXiv 2306.15595); llama3: the Llama 3.1 release.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trine.engine.model.config import RopeConfig


@lru_cache(maxsize=32)
def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """The angle per position of each channel pair: fp32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    return inv_freq.to(device)


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Stretch by the number of turns a channel makes within the original context.

    Fewer than `low_freq_factor`: divided by `factor`. More than `high_freq_factor`: kept. Between: a linear blend.
    """
    turns = rope.original_max_positions * inv_freq / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq
