"""Cross-attention: the decoder of an encoder-decoder looks at its source.

    o = softmax(scale * q(x) k(source)^T, over the keys of the row's own source) v(source), then o_proj

There are no positions in it and no order: a query sees the whole source. So the queries of several rows that share one
source (beams) are laid end to end, and its keys and values exist once. They are computed once for a source that is
kept (`Source.keeping`), and with every pass, gradients included, for one that is not.

Shapes: B sources, S source tokens, N rows of the decoder (a multiple of B), T tokens, C width, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trine.engine.model.config import ModelConfig
from trine.engine.model.layers import Linear
from trine.kernels.attention.mask import Mask, cross_mask, make_mask
from trine.kernels.attention.op import attention

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """What an encoder made of its texts; given to the decoder with every pass.

    `hidden_BSC`: its hidden states. `lengths_B`: tokens of each row where rows are padded at the end.
    One row of as many decoder tokens as there are sources has a token for each.
    `segment_ids_BS`: where a row holds several sources end to end, their numbers, ascending; a token of the decoder
    sees the source of its own number. `kept`: keys and values [B, H, S, D] by layer, once computed; None where they
    are not kept.
    """

    hidden_BSC: Tensor
    lengths_B: Tensor | None = None
    segment_ids_BS: Tensor | None = None
    kept: dict[int, KeysValues] | None = None

    @property
    def num_rows(self) -> int:
        return self.hidden_BSC.shape[0]

    def keeping(self) -> Source:
        """The same source, its keys and values computed once: for decoding token by token, without gradients."""
        return replace(self, kept={})

    def rows(self, rows: Tensor) -> Source:
        """The sources of these rows (int64), with what is kept of them."""
        kept = self.kept
        return Source(
            self.hidden_BSC[rows],
            None if self.lengths_B is None else self.lengths_B[rows],
            None if self.segment_ids_BS is None else self.segment_ids_BS[rows],
            None if kept is None else {layer: (k[rows], v[rows]) for layer, (k, v) in kept.items()},
        )

    def view(self, num_rows: int, num_queries: int, segment_ids_NT: Tensor | None) -> SourceView:
        """The source as one pass of the decoder sees it. Raises ValueError for rows or documents that do not match."""
        B, S = self.hidden_BSC.shape[:2]
        by_token = num_rows == 1 and num_queries == B
        if num_rows % B and not by_token:
            raise ValueError(
                f"{num_rows} rows of the decoder for {B} sources; give each source the same number of rows"
            )
        if (segment_ids_NT is None) != (self.segment_ids_BS is None):
            raise ValueError("segment ids of the source and of the target go together; give both or neither")
        if segment_ids_NT is not None and self.segment_ids_BS is not None:
            if num_rows != B:
                raise ValueError("packed sources serve one row each")
            mask = cross_mask(segment_ids_NT, self.segment_ids_BS)
        else:
            count = num_queries * num_rows // B
            mask = make_mask(causal=False, num_keys=S, num_queries=count, key_lengths_B=self.lengths_B)
        return SourceView(self, mask)


@dataclass(frozen=True, slots=True)
class SourceView:
    """A source and what a pass sees of it, the same in all layers."""

    source: Source
    mask: Mask

    def keys_values(self, layer: CrossAttention) -> KeysValues:
        kept = self.source.kept
        if kept is None:
            return layer.keys_values(self.source.hidden_BSC)
        if layer.layer not in kept:
            kept[layer.layer] = layer.keys_values(self.source.hidden_BSC)
        return kept[layer.layer]


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens over the source; q, k, v, o are separate parameters, as on disk."""

    def __init__(self, config: ModelConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.head_dim, self.scale, self.dropout = config.head_dim, config.attention_scale, config.dropout.attention
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.width, q_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.k_proj = Linear(config.width, kv_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.v_proj = Linear(config.width, kv_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.o_proj = Linear(q_width, config.width, bias=config.o_bias, device=device, dtype=dtype)

    def forward(self, x_NTC: Tensor, view: SourceView) -> Tensor:
        k_BHSD, v_BHSD = view.keys_values(self)
        N, T, _ = x_NTC.shape
        B = k_BHSD.shape[0]
        o_BHQD = attention(
            self._heads(self.q_proj(x_NTC).reshape(B, N * T // B, -1)),
            k_BHSD,
            v_BHSD,
            mask=view.mask,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.o_proj(o_BHQD.transpose(1, 2).reshape(N, T, -1))
        return out

    def keys_values(self, hidden_BSC: Tensor) -> KeysValues:
        """The keys and values of a source, each [B, H, S, D]."""
        return self._heads(self.k_proj(hidden_BSC)), self._heads(self.v_proj(hidden_BSC))

    def _heads(self, x_BSE: Tensor) -> Tensor:
        return x_BSE.reshape(*x_BSE.shape[:2], -1, self.head_dim).transpose(1, 2)
