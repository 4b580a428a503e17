"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and none on o.

With `use_sliding_window` the layers from `max_window_layers` on see a window. Class defaults are those of
transformers 5.23 `Qwen2Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.qwen3 import read_qwen_windows, write_qwen_windows
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    # The model of transformers takes width / heads and has no head_dim of its own.
    return read_decoder({**hf, "head_dim": None}, "qwen2", qkv_bias=True, **read_qwen_windows(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config), **write_qwen_windows(config)}


QWEN2 = Family(
    name="qwen2",
    title="Qwen2, Qwen2.5",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
