"""Initial weights.

Matrices and embeddings are normal with standard deviation `init_std`; the two matrices that write into the residual
stream are smaller by 1/sqrt(2 layers), so that its variance does not grow with depth (Radford et al. 2019). Norm
weights are 1 (0 where 1 is added), biases 0.

With `init_fan_in` (T5, Raffel et al. 2020) a matrix has the deviation 1/sqrt(inputs), that of q 1/sqrt(inputs * head
size) since the scores are not divided, embeddings and head have 1, and biases by distance 1/sqrt(width); all times
`init_std`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trine.engine.model.blocks import Attention
from trine.engine.model.config import ModelConfig
from trine.engine.model.layers import Embedding, HeadNorm, LayerNorm, Linear, RMSNorm
from trine.engine.model.moe import ExpertLinear
from trine.engine.model.positions import RelativeBias
from trine.engine.model.transformer import Transformer


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter. A generator of its own, on the CPU, makes the result independent of device and dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    residual_std = model.config.init_std * (2 * model.config.num_layers) ** -0.5
    fan_in = model.config.init_fan_in
    for name, module in model.named_modules():
        if isinstance(module, (RMSNorm, LayerNorm, HeadNorm)):
            module.weight.fill_(0.0 if isinstance(module, RMSNorm) and module.unit_offset else 1.0)
        elif isinstance(module, (Linear, Embedding, ExpertLinear, RelativeBias)):
            residual = name.endswith(
                ("self_attn.o_proj", "cross_attn.o_proj", "mlp.down_proj", "experts.down_proj", "expert.down_proj")
            )
            std = residual_std if residual else model.config.init_std
            _normal(module.weight, _fan_in_std(model.config, name, module) if fan_in else std, generator)
        if isinstance(module, (Linear, LayerNorm, ExpertLinear)) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, Attention) and module.sinks is not None:
            _normal(module.sinks, model.config.init_std, generator)
    if model.lm_bias is not None:
        model.lm_bias.zero_()


def _fan_in_std(config: ModelConfig, name: str, module: nn.Module) -> float:
    if isinstance(module, Embedding) or name == "lm_head":
        return config.init_std
    if isinstance(module, RelativeBias):
        return config.init_std / math.sqrt(config.width)
    assert isinstance(module.weight, Tensor)
    num_in: int = module.weight.shape[-1] * (config.head_dim if name.endswith("q_proj") else 1)
    return config.init_std / math.sqrt(num_in)


def _normal(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(std))
