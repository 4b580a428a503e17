"""Llama 2, 3, 3.1, 3.2 and what shares its format (TinyLlama, SmolLM, SmolLM2).

RMSNorm before each branch, rotary positions, grouped key/value heads, SwiGLU. `attention_bias` puts a bias on q, k, v
and o; `mlp_bias` on all three of the feed-forward. Class defaults are those of transformers 5.23 `LlamaConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.settings import read_decoder, write_decoder

# Frequencies that old files carry; they follow from the config.
FREQUENCIES = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")


def biases(hf: HfConfig) -> dict[str, Any]:
    """`attention_bias` and `mlp_bias`, where a family has them, as switches."""
    attention = bool(hf.get("attention_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(hf.get("mlp_bias"))}


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    return read_decoder(hf, "llama", **biases(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config), "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    name="llama",
    title="Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM, SmolLM2",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
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
