"""Mistral, Mistral Nemo and what shares the format: Llama whose tokens see a window of keys, in every layer.

`sliding_window` null means no window. Class defaults are those of transformers 5.23 `MistralConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    return read_decoder(hf, "mistral", window=hf.get("sliding_window"))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config), "sliding_window": config.window}


MISTRAL = Family(
    name="mistral",
    title="Mistral, Mistral Nemo",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral={"partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
