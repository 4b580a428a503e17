"""Qwen3 (dense): Llama with an RMSNorm over each head of q and k before the rotation, and a head_dim of its own.

`attention_bias` puts a bias on q, k, v and o. With `use_sliding_window` the layers from `max_window_layers` on see a
window. Class defaults are those of transformers 5.23 `Qwen3Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES, biases
from trine.engine.model.families.settings import read_decoder, read_windows, write_decoder, write_windows


def read_qwen_windows(hf: HfConfig) -> dict[str, Any]:
    """No window at all unless `use_sliding_window`."""
    if not hf.get("use_sliding_window"):
        return {}
    return read_windows(hf, is_full=lambda layer: layer < hf["max_window_layers"])


def write_qwen_windows(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_qwen_windows` reads."""
    full = config.num_layers if config.window is None else len(config.full_layers)
    return {**write_windows(config), "use_sliding_window": config.window is not None, "max_window_layers": full}


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    return read_decoder(hf, "qwen3", qk_norm="head", **biases(hf), **read_qwen_windows(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_decoder(config), "attention_bias": config.qkv_bias, **write_qwen_windows(config)}


QWEN3 = Family(
    name="qwen3",
    title="Qwen3 (dense)",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "num_key_value_heads": 32,
        "head_dim": 128,
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
