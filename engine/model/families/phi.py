"""Phi-1, Phi-1.5, Phi-2: LayerNorm, heads turned in part, both branches on one norm, biases everywhere.

`qk_layernorm` puts a LayerNorm over each head of q and k. Class defaults are those of transformers 5.23 `PhiConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig, names_with
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.rotary import read_rope
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    dropout = DropoutConfig(
        embedding=float(hf.get("embd_pdrop") or 0.0),
        attention=float(hf.get("attention_dropout") or 0.0),
        residual=float(hf.get("resid_pdrop") or 0.0),
    )
    return read_decoder(
        {**hf, "head_dim": None}, "phi", eps="layer_norm_eps", norm="layer", rope=read_rope(hf, partial=True),
        placement="parallel", mlp="plain", qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True, dropout=dropout,
        qk_norm="head" if hf.get("qk_layernorm") else None,
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.rope is not None
    hf = write_decoder(config, eps="layer_norm_eps")
    hf["rope_parameters"]["partial_rotary_factor"] = hf["partial_rotary_factor"] = config.rope.partial
    if config.activation == "gelu_tanh":
        hf["hidden_act"] = "gelu_new"
    return {
        **hf,
        "qk_layernorm": config.qk_norm is not None,
        "embd_pdrop": config.dropout.embedding,
        "resid_pdrop": config.dropout.residual,
    }


PHI = Family(
    name="phi",
    title="Phi-1, Phi-1.5, Phi-2",
    model_types=("phi",),
    architecture="PhiForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral={"tie_word_embeddings": False},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=names_with(
        {
            "model.layers.*.self_attn.dense": ("layers.*.self_attn.o_proj",),
            "model.layers.*.self_attn.q_layernorm": ("layers.*.self_attn.q_norm",),
            "model.layers.*.self_attn.k_layernorm": ("layers.*.self_attn.k_norm",),
            "model.layers.*.mlp.fc1": ("layers.*.mlp.up_proj",),
            "model.layers.*.mlp.fc2": ("layers.*.mlp.down_proj",),
            "model.final_layernorm": ("norm",),
        }
    ),
)
