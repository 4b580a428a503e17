"""One Transformer layer: attention and feed-forward, each in a residual branch.

    pre       x += A(norm(x))               x += F(norm(x))
    post      x += norm(A(x))               x += norm(F(x))
    both      x += norm(A(norm(x)))         x += norm(F(norm(x)))
    post_sum  x = norm(x + A(x))            x = norm(x + F(x))
    parallel  x += A(norm(x)) + F(norm(x))  on one norm, or (parallel_two) on one each

The decoder of an encoder-decoder has a third branch between the two, over its source, with a norm placed like theirs.
Every branch is multiplied by `residual_scale`, and dropped out in training.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head dimension, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.engine.model.cache import Step
from trine.engine.model.config import ModelConfig, RopeConfig
from trine.engine.model.cross_attention import CrossAttention, SourceView
from trine.engine.model.layers import HeadNorm, Linear, Norm, joined_linear, make_norm, records_gradients
from trine.engine.model.moe import MixtureOfExperts
from trine.engine.model.positions import Biases
from trine.engine.model.rotary import Tables
from trine.kernels.attention.op import Mask, attention
from trine.kernels.invariant.attention import Sequences, invariant_attention
from trine.kernels.invariant.elementwise import invariant_mlp
from trine.kernels.mlp.op import gated_mlp, mlp
from trine.kernels.rope.op import rope, rope_heads


@dataclass(frozen=True, slots=True)
class Context:
    """What the layers of one forward pass share: masks by window, or the step of a cache; rotary tables by rotation.

    In the deterministic mode without a cache, `sequences` by window instead of the masks. `biases`: of relative
    positions. `source`: what the decoder of an encoder-decoder looks at.
    """

    masks: Mapping[int | None, Mask]
    rope_tables: Mapping[RopeConfig | None, Tables]
    step: Step | None
    sequences: Mapping[int | None, Sequences] | None = None
    deterministic: bool = False
    biases: Biases | None = None
    source: SourceView | None = None


class Attention(nn.Module):
    """Self-attention with grouped key/value heads; q, k, v, o are separate parameters, as on disk."""

    def __init__(self, config: ModelConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout = config.dropout.attention
        self.norm_eps, self.norm_offset = config.norm_eps, config.norm == "rms_offset"
        self.window, self.rope = config.window_of(layer), config.rope_of(layer)
        self.rope_interleaved = config.rope_interleaved
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.width, q_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.k_proj = Linear(config.width, kv_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.v_proj = Linear(config.width, kv_width, bias=config.qkv_bias, device=device, dtype=dtype)
        self.o_proj = Linear(q_width, config.width, bias=config.o_bias, device=device, dtype=dtype)
        self.sinks = (
            nn.Parameter(torch.empty(config.num_heads, device=device, dtype=dtype)) if config.attention_sinks else None
        )
        self.qk_norm, self.qkv_clip = config.qk_norm, config.qkv_clip
        self.q_norm: Norm | HeadNorm | None = None
        self.k_norm: Norm | HeadNorm | None = None
        if config.qk_norm == "each_head":
            self.q_norm, self.k_norm = (
                HeadNorm(heads, config.head_dim, config.norm_eps, device=device, dtype=dtype)
                for heads in (config.num_heads, config.num_kv_heads)
            )
        elif config.qk_norm is not None:
            widths = (q_width, kv_width) if config.qk_norm == "full" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (make_norm(config, width, device=device, dtype=dtype) for width in widths)
        # What the kernel that norms and turns heads at once can do.
        self.turned_at_once = (
            config.qk_norm is None or (config.qk_norm == "head" and config.norm in ("rms", "rms_offset"))
        ) and config.qkv_clip is None

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        extras: Any = {"scale": self.scale, "softcap": self.softcap, "sinks_H": self.sinks}
        step = context.step
        if step is not None:
            extras |= {"window": self.window, "biases": context.biases}
            if (turning := step.turning) is not None:
                parts = self._cut(tuple(layer(x_BTC) for layer in self._projections), norms=not self.turned_at_once)
                tables = context.rope_tables.get(self.rope)
                o_BHTD = turning.turn_and_attend(self.layer, parts, tables, self._turn_options(), **extras)
            else:
                o_BHTD = step.attend(self.layer, *self.heads(x_BTC, context), **extras)
        elif context.sequences is not None:
            sequences = context.sequences[self.window]
            o_BHTD = invariant_attention(*self.heads(x_BTC, context), sequences=sequences, **extras)
        else:
            q_BHTD, k_BKTD, v_BKTD = self.heads(x_BTC, context)
            if context.biases is not None:
                extras["relative_bias_HR"] = context.biases.table(q_BHTD.shape[2], k_BKTD.shape[2])
            o_BHTD = attention(
                q_BHTD,
                k_BKTD,
                v_BKTD,
                mask=context.masks[self.window],
                dropout_p=self.dropout if self.training else 0.0,
                **extras,
            )
        return self.o_proj(o_BHTD.transpose(1, 2).flatten(2), deterministic=context.deterministic)  # type: ignore[no-any-return]

    def heads(self, x_BTC: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q_BHTD, k_BKTD, v_BKTD, normalised and rotated as the config says; in the deterministic mode always apart."""
        tables, deterministic = context.rope_tables.get(self.rope), context.deterministic
        layers = self._projections
        if records_gradients(self.q_proj) and not deterministic:
            qkv_BTE = joined_linear(x_BTC, *layers)
            if tables is not None and self.turned_at_once:
                return rope_heads(qkv_BTE, *tables, self.num_heads, self.num_kv_heads, **self._turn_options())
            parts = torch.split(qkv_BTE, [layer.weight.shape[0] for layer in layers], dim=-1)
        else:
            parts = tuple(layer(x_BTC, deterministic=deterministic) for layer in layers)
        q_BTHD, k_BTKD, v_BTKD = self._cut(parts)
        if tables is not None:
            q_BTHD, k_BTKD = (rope(x, *tables, interleaved=self.rope_interleaved) for x in (q_BTHD, k_BTKD))
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)

    @property
    def _projections(self) -> tuple[Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _cut(self, parts: tuple[Tensor, ...], *, norms: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q_BTHD, k_BTKD, v_BTKD of the products, clipped and normalised; not without `norms`."""
        q_BTE, k_BTE, v_BTE = parts
        if self.qk_norm == "full":
            q_BTE, k_BTE = self._norm(q_BTE, k_BTE)
        if self.qkv_clip is not None:
            q_BTE, k_BTE, v_BTE = (x.clamp(-self.qkv_clip, self.qkv_clip) for x in (q_BTE, k_BTE, v_BTE))
        q_BTHD, k_BTKD, v_BTKD = (x.reshape(*x.shape[:2], -1, self.head_dim) for x in (q_BTE, k_BTE, v_BTE))
        if norms and self.qk_norm in ("head", "each_head"):
            q_BTHD, k_BTKD = self._norm(q_BTHD, k_BTKD)
        return q_BTHD, k_BTKD, v_BTKD

    def _turn_options(self) -> dict[str, Any]:
        """The options of the kernels that turn heads, and normalise them where they can."""
        norms = (self.q_norm, self.k_norm) if self.turned_at_once else (None, None)
        q_weight, k_weight = (None if norm is None else norm.weight for norm in norms)
        return {
            "interleaved": self.rope_interleaved,
            "q_norm_weight": q_weight,
            "k_norm_weight": k_weight,
            "eps": self.norm_eps,
            "unit_offset": self.norm_offset,
        }

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) when gated, else down(act(up(x)))."""

    def __init__(
        self,
        config: ModelConfig,
        ffn_width: int | None = None,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation = config.activation
        width, ffn_width, bias = config.width, ffn_width or config.ffn_width, config.mlp_bias
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
    """A layer. Its norms bear the names of Llama's and Gemma's files; which of them there are follows the placement."""

    def __init__(self, config: ModelConfig, layer: int, *, device: torch.device | str | None, dtype: torch.dtype):
        super().__init__()
        self.placement = config.placement
        self.dropout, self.residual_scale = config.dropout.residual, config.residual_scale

        def norm(*placements: str) -> Norm | None:
            return make_norm(config, device=device, dtype=dtype) if config.placement in placements else None

        first = layer == 0 and not config.first_norm
        self.input_layernorm = None if first else norm("pre", "both", "parallel", "parallel_two")
        self.self_attn = Attention(config, layer, device=device, dtype=dtype)
        self.cross_attn = None if config.encoder is None else CrossAttention(config, layer, device=device, dtype=dtype)
        self.cross_attention_layernorm = None if config.encoder is None else norm("pre", "post_sum")
        # Before the feed-forward layer, except where norms follow their branch: then after attention.
        self.post_attention_layernorm = norm("pre", "post", "both", "post_sum", "parallel_two")
        self.pre_feedforward_layernorm = norm("both")
        self.post_feedforward_layernorm = norm("post", "both", "post_sum")
        self.mlp: MLP | MixtureOfExperts = (
            MixtureOfExperts(
                config, lambda width: MLP(config, width, device=device, dtype=dtype), device=device, dtype=dtype
            )
            if config.has_experts(layer)
            else MLP(config, device=device, dtype=dtype)
        )

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        if self.placement == "post_sum":
            return self._post_sum(x_BTC, context)
        return self._parallel(x_BTC, context) if "parallel" in self.placement else self._sequential(x_BTC, context)

    def _post_sum(self, x_BTC: Tensor, context: Context) -> Tensor:
        assert self.post_attention_layernorm is not None
        assert self.post_feedforward_layernorm is not None
        x_BTC, _ = self.post_attention_layernorm.add(x_BTC, self._branch(self.self_attn(x_BTC, context)))
        if self.cross_attn is not None:
            assert context.source is not None
            assert self.cross_attention_layernorm is not None
            branch_BTC = self._branch(self.cross_attn(x_BTC, context.source))
            x_BTC, _ = self.cross_attention_layernorm.add(x_BTC, branch_BTC)
        branch_BTC = self._branch(self.mlp(x_BTC, context.deterministic))
        return self.post_feedforward_layernorm.add(x_BTC, branch_BTC)[0]

    def _sequential(self, x_BTC: Tensor, context: Context) -> Tensor:
        follows = self.placement in ("post", "both")
        before, after = (
            (self.pre_feedforward_layernorm, self.post_attention_layernorm)
            if follows
            else (self.post_attention_layernorm, None)
        )
        branch_BTC = self.self_attn(x_BTC if self.input_layernorm is None else self.input_layernorm(x_BTC), context)
        branch_BTC = self._branch(branch_BTC if after is None else after(branch_BTC))
        if self.cross_attn is not None:
            assert context.source is not None
            assert self.cross_attention_layernorm is not None
            normed_BTC, x_BTC = self.cross_attention_layernorm.add(x_BTC, branch_BTC)
            branch_BTC = self._branch(self.cross_attn(normed_BTC, context.source))
        if before is None:
            normed_BTC = x_BTC = x_BTC + branch_BTC
        else:
            normed_BTC, x_BTC = before.add(x_BTC, branch_BTC)
        branch_BTC = self.mlp(normed_BTC, context.deterministic)
        if self.post_feedforward_layernorm is not None:
            branch_BTC = self.post_feedforward_layernorm(branch_BTC)
        return x_BTC + self._branch(branch_BTC)

    def _parallel(self, x_BTC: Tensor, context: Context) -> Tensor:
        assert self.input_layernorm is not None
        normed_BTC = self.input_layernorm(x_BTC)
        attended_BTC = self.self_attn(normed_BTC, context)
        if self.post_attention_layernorm is not None:
            normed_BTC = self.post_attention_layernorm(x_BTC)
        return x_BTC + self._branch(attended_BTC) + self._branch(self.mlp(normed_BTC, context.deterministic))

    def _branch(self, x_BTC: Tensor) -> Tensor:
        x_BTC = F.dropout(x_BTC, self.dropout, training=self.training) if self.dropout else x_BTC
        return x_BTC if self.residual_scale == 1.0 else x_BTC * self.residual_scale
