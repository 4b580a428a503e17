"""Mixtral: Mistral with a mixture of experts in every layer, whose weights are those of the chosen experts alone.

Class defaults are those of transformers 5.23 `MixtralConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.families.base import Family, HfConfig, names_with
from trine.engine.model.families.experts import stacked_experts, without_layers
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, require, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    moe = MoeConfig(
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        ffn_width=require(hf, "intermediate_size"),
        order="top_k_softmax",
    )
    return read_decoder(hf, "mixtral", window=hf.get("sliding_window"), moe=moe)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.moe is not None
    return {
        **write_decoder(config),
        "sliding_window": config.window,
        "intermediate_size": config.moe.ffn_width,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
    }


_EXPERT = "model.layers.*.block_sparse_moe.experts.%"
_OURS = "layers.*.mlp.experts"
_NAMES = {
    **names_with({}, base=without_layers("mlp")),
    "model.layers.*.block_sparse_moe.gate": ("layers.*.mlp.gate",),
    f"{_EXPERT}.w1": (f"{_OURS}.gate_proj",),
    f"{_EXPERT}.w3": (f"{_OURS}.up_proj",),
    f"{_EXPERT}.w2": (f"{_OURS}.down_proj",),
}
MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral={"partial_rotary_factor": 1.0, "attention_bias": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=_NAMES,
    **stacked_experts(_NAMES, "model.layers.*.block_sparse_moe"),
)
