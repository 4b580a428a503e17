"""Gemma 2: Gemma with a norm after each branch too, softcaps on scores and logits, and a window on every other layer.

Scores are multiplied by `query_pre_attn_scalar` ** -0.5. Class defaults are those of transformers 5.23
`Gemma2Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.gemma import GEMMA_DEFAULTS, gemma_switches
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, read_windows, require, write_decoder, write_windows


def gemma2_switches(hf: HfConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 have beyond Gemma 1."""
    return {
        **gemma_switches(hf),
        "placement": "both",
        "attention_scale": float(require(hf, "query_pre_attn_scalar")) ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping"),
        "logit_softcap": hf.get("final_logit_softcapping"),
    }


def gemma2_settings(config: ModelConfig) -> dict[str, Any]:
    """The keys that `gemma2_switches` reads, and those of the windows."""
    assert config.attention_scale is not None, "Gemma has a scale of its own"
    scalar = config.attention_scale**-2
    return {
        **write_windows(config),
        "attention_bias": config.qkv_bias,
        # transformers declares an integer; its square root comes back without a rounding.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "use_bidirectional_attention": False,
    }


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    windows = read_windows(hf, is_full=lambda layer: layer % 2 == 1)
    return read_decoder(hf, "gemma2", activation="hidden_activation", **gemma2_switches(hf), **windows)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config, activation="hidden_activation"), **gemma2_settings(config)}


GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    defaults={
        **GEMMA_DEFAULTS,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    neutral={"partial_rotary_factor": 1.0, "use_bidirectional_attention": False, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
