"""Positions that are neither rotary nor rows of a table: relative biases (T5) and sinusoids (the first Transformer).

A relative bias is a learned number for each head and each bucket of distances, added to the scores. Half of the buckets
hold one distance each; the other half grow logarithmically up to `max_distance`, and the last takes all beyond. An
encoder keeps half of its buckets for keys to the right.

Shapes: T queries, S keys, H heads, R = T + S - 1 distances, C width.
Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1; Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """The table of a stack of layers, which all share it. `weight` is [buckets, H], as on disk."""

    def __init__(
        self,
        num_buckets: int,
        max_distance: int,
        num_heads: int,
        *,
        causal: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.max_distance, self.causal = max_distance, causal
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))

    def forward(self, num_queries: int, num_keys: int, first: int = 0) -> Tensor:
        """The bias of each distance, [H, R]; entry s - t + T - 1 is that of key s and query `first` + t."""
        distances_R = torch.arange(-num_queries + 1, num_keys, device=self.weight.device) - first
        return self.of(distances_R).T

    def of(self, distances: Tensor) -> Tensor:
        """The biases of distances, key minus query: [..., H]."""
        buckets = relative_buckets(
            distances, num_buckets=len(self.weight), max_distance=self.max_distance, causal=self.causal
        )
        return self.weight[buckets]


def relative_buckets(distances: Tensor, *, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket (int64) of each distance, key minus query. `causal`: keys to the right all count as distance 0."""
    first = torch.zeros_like(distances)
    if causal:
        back = (-distances).clamp(min=0)
    else:
        num_buckets //= 2
        first = (distances > 0) * num_buckets
        back = distances.abs()
    exact = num_buckets // 2
    # In float32, in this order: at the borders of buckets the rounding decides.
    share = torch.log(back.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(back < exact, back, far)


@dataclass(frozen=True, slots=True)
class Biases:
    """The relative bias of a stack during one forward pass: each table is made once and shared by the layers.

    `make` it before layers whose activations are recomputed: a layer must do the same both times.
    """

    bias: RelativeBias
    tables: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, bias: RelativeBias | None, num_tokens: int | None = None) -> Biases | None:
        """For a stack; with the table of a text of `num_tokens` where it is known. None where there is no bias."""
        if bias is None:
            return None
        biases = cls(bias)
        if num_tokens is not None:
            biases.table(num_tokens, num_tokens)
        return biases

    def scattered(self, positions_N: Tensor, num_keys: int) -> Tensor:
        """The bias of queries at any positions and the first `num_keys` keys: [N, H, S]; asked for by every layer of a
        pass alike.
        """
        key = (len(positions_N), num_keys, -1)
        if key not in self.tables:
            distances_NS = torch.arange(num_keys, device=positions_N.device) - positions_N[:, None]
            self.tables[key] = self.bias.of(distances_NS).transpose(1, 2)
        return self.tables[key]

    def table(self, num_queries: int, num_keys: int, first: int = 0) -> Tensor:
        """See `RelativeBias.forward`."""
        key = (num_queries, num_keys, first)
        if key not in self.tables:
            self.tables[key] = self.bias(*key)
        return self.tables[key]


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """sin of each position times 10000 ** (-2 i / C) in the first half of the channels, cos in the second: [..., C].

    The paper takes turns instead of halves, which is the same up to the order of channels. An odd width has one more
    sine. Angles are computed in float64, the result is float32.
    """
    num_sines = (width + 1) // 2
    exponents = 2 * torch.arange(num_sines, dtype=torch.float64, device=positions.device) / width
    angles = positions[..., None].double() / 10_000.0**exponents
    return torch.cat((angles.sin(), angles.cos()[..., : width // 2]), dim=-1).float()
