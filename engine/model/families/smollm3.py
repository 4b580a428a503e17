"""SmolLM3: Llama in which every fourth layer has no positions.

`no_rope_layers` says for each layer 1 where it is turned and 0 where it is not. Class defaults are those of
transformers 5.23 `SmolLM3Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES, biases
from trine.engine.model.families.settings import read_decoder, read_windows, require, write_decoder, write_windows


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    count = require(hf, "num_hidden_layers")
    turned = hf.get("no_rope_layers")
    if turned is None:
        turned = [(layer + 1) % hf["no_rope_layer_interval"] for layer in range(count)]
    if len(turned) < count:
        raise CheckpointError(f"config.json has {len(turned)} no_rope_layers for {count} layers; give one for each")
    unrotated = tuple(layer for layer in range(count) if not turned[layer])
    windows = read_windows(hf, is_full=lambda layer: layer not in unrotated) if hf.get("use_sliding_window") else {}
    return read_decoder(hf, "smollm3", unrotated_layers=unrotated, **biases(hf), **windows)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        **write_decoder(config),
        **write_windows(config),
        "use_sliding_window": config.window is not None,
        "no_rope_layers": [int(layer not in config.unrotated_layers) for layer in range(config.num_layers)],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


SMOLLM3 = Family(
    name="smollm3",
    title="SmolLM3",
    model_types=("smollm3",),
    architecture="SmolLM3ForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
    },
    neutral={"partial_rotary_factor": 1.0},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
