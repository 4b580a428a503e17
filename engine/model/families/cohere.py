"""Cohere (Command R): LayerNorm without bias, neighbouring channels turned, both branches on one norm, scaled logits.

`use_qk_norm` (R+) norms each head of q and k under a weight of its own.
Class defaults are those of transformers 5.23 `CohereConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import LLAMA_NAMES, Family, HfConfig
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    bias = bool(hf.get("attention_bias"))
    return read_decoder(
        {**hf, "head_dim": None}, "cohere", eps="layer_norm_eps", norm="layer_unbiased", placement="parallel",
        rope_interleaved=True, qkv_bias=bias, o_bias=bias, logit_scale=float(hf["logit_scale"]),
        qk_norm="each_head" if hf.get("use_qk_norm") else None,
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        **write_decoder(config, eps="layer_norm_eps"),
        "attention_bias": config.qkv_bias,
        "logit_scale": config.logit_scale,
        "use_qk_norm": config.qk_norm is not None,
    }


COHERE = Family(
    name="cohere",
    title="Cohere Command R, R+",
    model_types=("cohere",),
    architecture="CohereForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "logit_scale": 0.0625,
        "rope_theta": 500_000.0,
        "bos_token_id": 5,
        "eos_token_id": 255_001,
        "pad_token_id": 0,
    },
    neutral={"partial_rotary_factor": 1.0, "mlp_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=LLAMA_NAMES,
)
