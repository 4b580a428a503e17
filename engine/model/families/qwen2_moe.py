"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts, and one expert more that takes every token, gated.

Class defaults are those of transformers 5.23 `Qwen2MoeConfig`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.experts import EXPERT_NAMES, read_experts, stacked_experts, write_experts
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, read_windows, write_decoder, write_windows


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    windows: dict[str, Any] = {}
    if hf.get("use_sliding_window"):
        windows = read_windows(hf, is_full=lambda layer: layer % 2 == 1 or layer >= hf["max_window_layers"])
    moe = replace(read_experts(hf), shared_width=hf["shared_expert_intermediate_size"])
    return read_decoder({**hf, "head_dim": None}, "qwen2_moe", qkv_bias=bool(hf["qkv_bias"]), moe=moe, **windows)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.moe is not None
    return {
        **write_decoder(config),
        **write_experts(config),
        **write_windows(config),
        "shared_expert_intermediate_size": config.moe.shared_width,
        "qkv_bias": config.qkv_bias,
        "use_sliding_window": config.window is not None,
        "max_window_layers": config.num_layers,
    }


QWEN2_MOE = Family(
    name="qwen2_moe",
    title="Qwen1.5-MoE, Qwen2-MoE",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
    },
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=EXPERT_NAMES,
    **stacked_experts(EXPERT_NAMES),
)
