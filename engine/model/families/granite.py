"""Granite: Llama with factors on embeddings, branches, scores and logits.

Class defaults are those of transformers 5.23 `GraniteConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES, biases
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    return read_decoder(
        hf, "granite", embedding_scale=float(hf["embedding_multiplier"]),
        residual_scale=float(hf["residual_multiplier"]), attention_scale=float(hf["attention_multiplier"]),
        logit_scale=1.0 / float(hf["logits_scaling"]), **biases(hf),
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        **write_decoder(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }


GRANITE = Family(
    name="granite",
    title="Granite",
    model_types=("granite",),
    architecture="GraniteForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral={"partial_rotary_factor": 1.0},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
