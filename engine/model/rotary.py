"""The angles of rotary positions, with the scalings that stretch a context.

Sources: Su et al. 2021 (arXiv 2104.09864); linear: Chen et al. 2023 (arXiv 2306.15595); dynamic: NTK-aware scaling by
length, as in Peng et al. 2023; llama3: the Llama 3.1 release;
yarn: Peng et al. 2023 (arXiv 2309.00071); longrope: Ding et al. 2024 (arXiv 2402.13753); proportional: Gemma 4.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trine.engine.model.config import RopeConfig
from trine.kernels.rope.op import rope_tables

Tables = tuple[Tensor, Tensor]


@lru_cache(maxsize=32)
def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device, long: bool = False) -> Tensor:
    """The angle per position of each channel pair that is turned: fp32 [R].

    `long`: for a sequence beyond the original context, which matters to longrope alone.
    """
    pairs = rope.num_pairs(head_dim)
    turned = head_dim if rope.kind == "proportional" else int(head_dim * rope.partial)
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / turned))
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.kind == "yarn":
        inv_freq = _yarn(inv_freq, rope, turned)
    elif rope.kind == "longrope":
        inv_freq = inv_freq / torch.tensor(rope.long_factors if long else rope.short_factors)
    elif rope.kind == "proportional":
        inv_freq[int(rope.partial * head_dim // 2) :] = 0.0
        inv_freq = inv_freq / rope.factor
    return inv_freq.to(device)


def rotary_tables(
    rope: RopeConfig,
    head_dim: int,
    positions_BT: Tensor,
    dtype: torch.dtype,
    longer_BT: Tensor | None = None,
    lengths_BT: Tensor | None = None,
) -> Tables:
    """The cos and sin of every position, each [B, T, R] in `dtype`, times the attention factor in fp32.

    `longer_BT` (bool): which tokens belong to a sequence beyond the original context; needed for longrope alone.
    `lengths_BT`: tokens of the sequence that each belongs to, for dynamic rotations; None where none is beyond it.
    """
    frequencies = inverse_frequencies(rope, head_dim, positions_BT.device)
    if rope.kind == "longrope":
        assert longer_BT is not None
        longer = inverse_frequencies(rope, head_dim, positions_BT.device, long=True)
        frequencies = torch.where(longer_BT[..., None], longer, frequencies)
    if rope.kind == "dynamic" and lengths_BT is not None:
        frequencies = _dynamic(rope, head_dim, lengths_BT, frequencies)
    if rope.attention_factor == 1.0:
        return rope_tables(positions_BT, frequencies, dtype)
    cos, sin = rope_tables(positions_BT, frequencies, torch.float32)
    return (cos * rope.attention_factor).to(dtype), (sin * rope.attention_factor).to(dtype)


def sequence_lengths(positions_BT: Tensor, segment_ids_BT: Tensor | None, lengths_B: Tensor | None) -> Tensor:
    """Tokens of the sequence that each token belongs to: int64 [B, T], or [B, 1] where a row is one sequence."""
    if lengths_B is not None:
        return lengths_B.to(positions_BT.device)[:, None]
    if segment_ids_BT is None:
        return positions_BT.amax(dim=1, keepdim=True) + 1
    starts_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    number_N = starts_BT.flatten().cumsum(0) - 1
    last_N = positions_BT.expand_as(segment_ids_BT).flatten()
    # As many places as tokens: how many documents there are is not waited for.
    longest_N = torch.zeros_like(last_N).scatter_reduce(0, number_N, last_N, "amax")
    return longest_N[number_N].view_as(segment_ids_BT) + 1


def _dynamic(rope: RopeConfig, head_dim: int, lengths_BT: Tensor, plain_R: Tensor) -> Tensor:
    """[B, T, R]: of sequences of L tokens beyond the original context M those of a larger theta,

    theta (factor L / M - (factor - 1)) ** (D / (D - 2))        D channels that are turned
    """
    turned, original = int(head_dim * rope.partial), rope.original_max_positions
    growth_BT = rope.factor * lengths_BT.float() / original - (rope.factor - 1)
    theta_BT = rope.theta * growth_BT.clamp(min=1.0) ** (turned / (turned - 2))
    powers_R = torch.arange(0, turned, 2, dtype=torch.float32, device=lengths_BT.device) / turned
    return torch.where((lengths_BT > original)[..., None], 1.0 / theta_BT[..., None] ** powers_R, plain_R)


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Stretch by the number of turns a channel makes within the original context.

    Fewer than `low_freq_factor`: divided by `factor`. More than `high_freq_factor`: kept. Between: a linear blend.
    """
    turns = rope.original_max_positions * inv_freq / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq


def _yarn(inv_freq: Tensor, rope: RopeConfig, turned: int) -> Tensor:
    """Pairs of more than `beta_fast` turns within the original context are kept, of fewer than `beta_slow` divided.

    The ramp between is linear in the number of the pair.
    """

    def pair_of(turns: float) -> float:
        return turned * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, turned - 1)
    if first == last:
        last += 0.001
    divide = ((torch.arange(len(inv_freq), dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return inv_freq / rope.factor * divide + inv_freq * (1 - divide)
