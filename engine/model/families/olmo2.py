"""OLMo 2: Llama with norms after each branch, inside the residual, and over the whole projections of q and k.

Class defaults are those of transformers 5.23 `Olmo2Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, write_decoder


def olmo_switches(hf: HfConfig) -> dict[str, Any]:
    """What OLMo 2 and 3 have."""
    bias = bool(hf.get("attention_bias"))
    return {"placement": "post", "qk_norm": "full", "qkv_bias": bias, "o_bias": bias}


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    return read_decoder({**hf, "head_dim": None}, "olmo2", **olmo_switches(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config), "attention_bias": config.qkv_bias}


OLMO_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}
OLMO2 = Family(
    name="olmo2",
    title="OLMo 2",
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    defaults={**OLMO_DEFAULTS, "rope_theta": 10_000.0},
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
