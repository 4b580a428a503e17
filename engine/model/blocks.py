"""One Transformer layer: attention and feed-forward, each in a residual branch.

    x += drop(Attention(norm(x)))        x += drop(MLP(norm(x)))

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head dimension, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.engine.model.cache import Step
from trine.engine.model.config import ModelConfig
from trine.engine.model.layers import Linear, RMSNorm, joined_linear, make_norm, records_gradients
from trine.kernels.attention.op import Mask, attention
from trine.kernels.invariant.attention import Sequences, invariant_attention
from trine.kernels.invariant.elementwise import invariant_mlp
from trine.kernels.mlp.op import gated_mlp, mlp
from trine.kernels.rope.op import rope, rope_heads


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer of one forward pass shares: the mask or the step of a cache, and the rotary tables.

    In the deterministic mode, `sequences` instead of the mask.
    """

    mask: Mask | None
    rope_tables: tuple[Tensor, Tensor] | None
    step: Step | None
    sequences: Sequences | None = None
    deterministic: bool = False


class Attention(nn.Module):
    """Self-attention with grouped key/value heads; q, k, v, o are separate parameters, as on disk."""

    def __init__(self, config: ModelConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout.attention
        self.norm_eps = config.norm_eps
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.width, q_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.k_proj = Linear(config.width, kv_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.v_proj = Linear(config.width, kv_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.o_proj = Linear(q_width, config.width, bias=config.o_bias, device=device, dtype=dtype)
        if config.qk_norm == "head":
            self.q_norm: RMSNorm | None = RMSNorm(config.head_dim, config.norm_eps, device=device, dtype=dtype)
            self.k_norm: RMSNorm | None = RMSNorm(config.head_dim, config.norm_eps, device=device, dtype=dtype)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        q_BHTD, k_BKTD, v_BKTD = self._heads(x_BTC, context.rope_tables, context.deterministic)
        if context.step is not None:
            o_BHTD = context.step.attend(self.layer, q_BHTD, k_BKTD, v_BKTD)
        elif context.sequences is not None:
            o_BHTD = invariant_attention(q_BHTD, k_BKTD, v_BKTD, sequences=context.sequences)
        else:
            assert context.mask is not None
            dropout_p = self.dropout if self.training else 0.0
            o_BHTD = attention(q_BHTD, k_BKTD, v_BKTD, mask=context.mask, dropout_p=dropout_p)
        return self.o_proj(o_BHTD.transpose(1, 2).flatten(2), deterministic=context.deterministic)  # type: ignore[no-any-return]

    def _heads(
        self, x_BTC: Tensor, tables: tuple[Tensor, Tensor] | None, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_BHTD, k_BKTD, v_BKTD, normalised and rotated as the config says; in the deterministic mode always apart."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if records_gradients(self.q_proj) and not deterministic:
            qkv_BTE = joined_linear(x_BTC, *layers)
            if tables is not None:
                return rope_heads(
                    qkv_BTE,
                    *tables,
                    self.num_heads,
                    self.num_kv_heads,
                    q_norm_weight=None if self.q_norm is None else self.q_norm.weight,
                    k_norm_weight=None if self.k_norm is None else self.k_norm.weight,
                    eps=self.norm_eps,
                )
            parts = torch.split(qkv_BTE, [layer.weight.shape[0] for layer in layers], dim=-1)
        else:
            parts = tuple(layer(x_BTC, deterministic=deterministic) for layer in layers)
        q_BTHD, k_BTKD, v_BTKD = (part.reshape(*part.shape[:2], -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if tables is not None:
            q_BTHD, k_BTKD = rope(q_BTHD, *tables), rope(k_BTKD, *tables)
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) when gated, else down(act(up(x)))."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.activation = config.activation
        width, ffn_width, bias = config.width, config.ffn_width, config.mlp_bias
        self.gate_proj = (
            Linear(width, ffn_width, bias=bias, device=device, dtype=dtype) if config.mlp == "gated" else None
        )
        self.up_proj = Linear(width, ffn_width, bias=bias, device=device, dtype=dtype)
        self.down_proj = Linear(ffn_width, width, bias=bias, device=device, dtype=dtype)

    def forward(self, x_BTC: Tensor, deterministic: bool = False) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if deterministic:
            return invariant_mlp(
                x_BTC,
                None if gate is None else gate.weight,
                up.weight,
                down.weight,
                activation=self.activation,
                gate_bias=None if gate is None else gate.bias,
                up_bias=up.bias,
                down_bias=down.bias,
            )
        if gate is None:
            return mlp(x_BTC, up.weight, down.weight, activation=self.activation, up_bias=up.bias, down_bias=down.bias)
        return gated_mlp(
            x_BTC,
            gate.weight,
            up.weight,
            down.weight,
            activation=self.activation,
            gate_bias=gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
        )


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, config: ModelConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.dropout = config.dropout.residual
        self.input_layernorm = make_norm(config, device=device, dtype=dtype)
        self.self_attn = Attention(config, layer, device=device, dtype=dtype)
        self.post_attention_layernorm = make_norm(config, device=device, dtype=dtype)
        self.mlp = MLP(config, device=device, dtype=dtype)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        branch_BTC = self._drop(self.self_attn(self.input_layernorm(x_BTC), context))
        normed_BTC, x_BTC = self.post_attention_layernorm.add(x_BTC, branch_BTC)
        return x_BTC + self._drop(self.mlp(normed_BTC, context.deterministic))

    def _drop(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(x_BTC, self.dropout, training=self.training) if self.dropout else x_BTC
