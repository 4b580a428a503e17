"""Qwen3 (dense): Llama with an RMSNorm over each head of q and k before the rotation, and a head_dim of its own.

`attention_bias` puts a bias on q, k, v and o. Class defaults are those of transformers 5.23 `Qwen3Config`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import llama
from trine.engine.model.families.base import Family, HfConfig


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    if "sliding_attention" in (hf.get("layer_types") or ()):
        raise CheckpointError("config.json has layer_types with sliding_attention; only full_attention is supported")
    return replace(llama.to_config(hf), family="qwen3", qk_norm="head")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    hf = llama.to_hf(config)
    del hf["mlp_bias"]
    return {**hf, "use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    neutral={"partial_rotary_factor": 1.0, "use_sliding_window": False},
    ignored=llama.LLAMA.ignored,
    to_config=to_config,
    to_hf=to_hf,
    rules=llama.rules,
)
