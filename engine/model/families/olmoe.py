"""OLMoE: a mixture of experts in every layer, and norms over the whole projections of q and k.

`clip_qkv` keeps q, k and v within a range. Class defaults are those of transformers 5.23 `OlmoeConfig`.
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
    return read_decoder(
        {**hf, "head_dim": None}, "olmoe", qk_norm="full", qkv_bias=bias, o_bias=bias,
        moe=read_experts(hf, "intermediate_size"), qkv_clip=hf.get("clip_qkv"),
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    hf = {**write_decoder(config), **write_experts(config, "intermediate_size")}
    return {**hf, "attention_bias": config.qkv_bias, "clip_qkv": config.qkv_clip}


OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    neutral={
        "partial_rotary_factor": 1.0,
        "mlp_bias": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=EXPERT_NAMES,
    **stacked_experts(EXPERT_NAMES),
)
