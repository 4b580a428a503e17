"""Qwen3-MoE: Qwen3 with a mixture of experts in its layers, except those of `mlp_only_layers`.

Class defaults are those of transformers 5.23 `Qwen3MoeConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.experts import EXPERT_NAMES, read_experts, stacked_experts, write_experts
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    bias = bool(hf.get("attention_bias"))
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return read_decoder(
        hf, "qwen3_moe", qk_norm="head", qkv_bias=bias, o_bias=bias, window=window, moe=read_experts(hf)
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        **write_decoder(config),
        **write_experts(config),
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
    },
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=EXPERT_NAMES,
    **stacked_experts(EXPERT_NAMES),
)
