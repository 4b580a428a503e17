"""Gemma 1: Llama with norms that multiply by 1 + weight, GeGLU and embeddings times sqrt(width).

`hidden_act` "gelu" in old files means its tanh form. Class defaults are those of transformers 5.23 `GemmaConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, require, write_decoder


def gemma_switches(hf: HfConfig) -> dict[str, Any]:
    """What all Gemmas have."""
    bias = bool(hf.get("attention_bias"))
    scale = float(require(hf, "hidden_size")) ** 0.5
    return {"norm": "rms_offset", "embedding_scale": scale, "qkv_bias": bias, "o_bias": bias}


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    if hf["hidden_act"] == "gelu":
        hf = {**hf, "hidden_act": "gelu_pytorch_tanh"}
    return read_decoder(hf, "gemma", **gemma_switches(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config), "attention_bias": config.qkv_bias}


GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA = Family(
    name="gemma",
    title="Gemma 1",
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    prefix="model.",
    defaults={**GEMMA_DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    # `hidden_activation` stands beside `hidden_act` in some files, and transformers does not read it.
    neutral={"partial_rotary_factor": 1.0, "use_bidirectional_attention": False, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
