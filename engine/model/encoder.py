"""The encoder of an encoder-decoder: layers whose tokens see all of their own text, after the embedding of the decoder.

Shapes: B texts, S tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trine.engine.model.blocks import Block, Context
from trine.engine.model.config import ModelConfig
from trine.engine.model.layers import Norm, make_norm
from trine.engine.model.positions import Biases, RelativeBias
from trine.kernels.attention.op import make_mask


class Encoder(nn.Module):
    """`config`: `ModelConfig.of_encoder` of the whole model's."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config, layer, device=device, dtype=dtype) for layer in range(config.num_layers)
        )
        self.relative_bias = make_relative_bias(config, device=device, dtype=dtype)
        self.norm: Norm | nn.Identity = (
            make_norm(config, device=device, dtype=dtype) if config.final_norm else nn.Identity()
        )

    def forward(
        self,
        x_BSC: Tensor,
        *,
        lengths_B: Tensor | None,
        segment_ids_BS: Tensor | None,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm, [B, S, C]; see `Transformer.encode`. `x_BSC`: the embedded texts."""
        mask = make_mask(causal=False, num_keys=x_BSC.shape[1], key_lengths_B=lengths_B, segment_ids_BT=segment_ids_BS)
        biases = Biases.make(self.relative_bias, x_BSC.shape[1])
        context = Context({None: mask}, {}, None, biases=biases)
        for layer in self.layers:
            if checkpoint_activations and torch.is_grad_enabled():
                x_BSC = checkpoint(layer, x_BSC, context, use_reentrant=False)
            else:
                x_BSC = layer(x_BSC, context)
        hidden_BSC: Tensor = self.norm(x_BSC)
        return hidden_BSC


def make_relative_bias(
    config: ModelConfig, *, device: torch.device | str | None, dtype: torch.dtype
) -> RelativeBias | None:
    """The table of a stack with relative positions."""
    if config.positions != "relative":
        return None
    return RelativeBias(
        config.relative_buckets, config.relative_max_distance, config.num_heads, causal=config.causal, device=device,
        dtype=dtype,
    )  # fmt: skip
