"""Gemma 3, its text part: Gemma 2 with norms of q and k, five layers with a window for one without, two rotations.

Layers with a window turn at `rope_local_base_freq`, the others at `rope_theta`, scaled. In the new layout each kind of
layer has a table of its own. Class defaults are those of transformers 5.23 `Gemma3TextConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.gemma import GEMMA_DEFAULTS
from trine.engine.model.families.gemma2 import gemma2_settings, gemma2_switches
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.rotary import read_two_ropes, write_two_ropes
from trine.engine.model.families.settings import read_decoder, read_windows, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    period = hf["sliding_window_pattern"]
    windows = read_windows(hf, is_full=lambda layer: (layer + 1) % period == 0)
    ropes = read_two_ropes(hf, window_theta=hf["rope_local_base_freq"], windows=windows)
    return read_decoder(
        hf, "gemma3", activation="hidden_activation", qk_norm="head", **gemma2_switches(hf), **windows, **ropes
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    hf = {**write_decoder(config, activation="hidden_activation"), **gemma2_settings(config)}
    local = config.rope if config.window_rope is None else config.window_rope
    assert local is not None
    return {**hf, **write_two_ropes(config), "rope_local_base_freq": local.theta}


GEMMA3 = Family(
    name="gemma3",
    title="Gemma 3 (text)",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    defaults={
        **GEMMA_DEFAULTS,
        # Files of the multimodal models leave out what equals these.
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    # transformers ignores `attn_logit_softcapping`, which no released file has.
    neutral={
        "attn_logit_softcapping": None,
        "partial_rotary_factor": 1.0,
        "use_bidirectional_attention": False,
        "mlp_bias": False,
    },
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
