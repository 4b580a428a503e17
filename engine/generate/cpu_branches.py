"""What compiled decoding steps call between their parts, in torch: cross-attention, and norms of sums (`cpu_step.py`).

    before branches   x += cross(norm(x))                                                  between the branches
    of sums           x = norm(x), which attention was added to; x = norm(x + cross(x))    between the branches
                      x = norm(x)                                                          behind them

Shapes: R sequences with one new token each, S source tokens, C width, H heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.engine.model.config import ModelConfig
from trine.engine.model.cross_attention import CrossAttention, Source
from trine.engine.model.layers import LayerNorm, Linear
from trine.kernels.cpu.layer import InPlace
from trine.kernels.cpu.matvec import matvec


@dataclass
class StepSource:
    """What all layers of a step look at: a row for each sequence, with its kept keys and values."""

    source: Source | None = None
    mask_R11S: Tensor | None = None

    def give(self, source: Source) -> None:
        """The sources of the step that follows, the same object as long as they are the same."""
        if source is self.source:
            return
        self.source, self.mask_R11S = source, None
        if source.lengths_B is not None:
            places_S = torch.arange(source.hidden_BSC.shape[1])
            self.mask_R11S = (places_S < source.lengths_B[:, None])[:, None, None]


def between(block: Any, config: ModelConfig, dtype: torch.dtype, looked_at: StepSource) -> InPlace | None:
    """What comes between the branches of a layer; None where nothing does."""
    of_sums, scale = config.placement == "post_sum", config.residual_scale
    cross: CrossAttention | None = block.cross_attn
    if cross is None and not of_sums:
        return None
    first, second = block.post_attention_layernorm if of_sums else None, block.cross_attention_layernorm

    def change(x_RC: Tensor) -> None:
        if first is not None:
            x_RC.copy_(_normed(first, x_RC))
        if cross is None:
            return
        if of_sums:
            x_RC.copy_(_normed(second, x_RC.add(_attended(cross, x_RC, dtype, looked_at), alpha=scale)))
        else:
            x_RC.add_(_attended(cross, _normed(second, x_RC), dtype, looked_at), alpha=scale)

    return change


def behind(block: Any, config: ModelConfig) -> InPlace | None:
    """What comes behind both branches; None where nothing does."""
    norm = block.post_feedforward_layernorm
    if config.placement != "post_sum":
        return None

    def change(x_RC: Tensor) -> None:
        x_RC.copy_(_normed(norm, x_RC))

    return change


def _normed(norm: nn.Module, x_RC: Tensor) -> Tensor:
    """In fp32."""
    assert isinstance(norm.weight, Tensor)
    weight_C = norm.weight.float()
    if isinstance(norm, LayerNorm):
        return F.layer_norm(x_RC, weight_C.shape, weight_C, None if norm.bias is None else norm.bias.float(), norm.eps)
    return F.rms_norm(x_RC, weight_C.shape, weight_C + float(norm.unit_offset), norm.eps)  # type: ignore[arg-type]


def _attended(cross: CrossAttention, x_RC: Tensor, dtype: torch.dtype, looked_at: StepSource) -> Tensor:
    """Cross-attention's branch, in fp32."""
    source = looked_at.source
    assert source is not None
    assert source.kept is not None
    k_RHSD, v_RHSD = source.kept[cross.layer]
    q_RE = _linear(cross.q_proj, x_RC.to(dtype))
    q_RH1D = q_RE.view(len(q_RE), -1, 1, cross.head_dim)
    o_RH1D = F.scaled_dot_product_attention(q_RH1D, k_RHSD, v_RHSD, attn_mask=looked_at.mask_R11S, scale=cross.scale)
    return _linear(cross.o_proj, o_RH1D.reshape(q_RE.shape)).float()


def _linear(layer: nn.Module, x_RC: Tensor) -> Tensor:
    if type(layer) is Linear:
        return matvec(x_RC, layer.weight, layer.bias)
    found: Tensor = layer(x_RC)
    return found
