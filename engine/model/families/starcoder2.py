"""StarCoder2: LayerNorm, rotary positions, a window, biases (`use_bias`) and a feed-forward layer without gate.

Class defaults are those of transformers 5.23 `Starcoder2Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig, names_with
from trine.engine.model.families.llama import FREQUENCIES
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    bias = bool(hf["use_bias"])
    dropout = DropoutConfig(
        embedding=float(hf.get("embedding_dropout") or 0.0),
        attention=float(hf.get("attention_dropout") or 0.0),
        residual=float(hf.get("residual_dropout") or 0.0),
    )
    return read_decoder(
        hf, "starcoder2", eps="norm_epsilon", norm="layer", mlp="plain", qkv_bias=bias, o_bias=bias, mlp_bias=bias,
        window=hf.get("sliding_window"), dropout=dropout,
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        **write_decoder(config, eps="norm_epsilon"),
        "use_bias": config.qkv_bias,
        "sliding_window": config.window,
        "embedding_dropout": config.dropout.embedding,
        "residual_dropout": config.dropout.residual,
    }


STARCODER2 = Family(
    name="starcoder2",
    title="StarCoder2",
    model_types=("starcoder2",),
    architecture="Starcoder2ForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.018042,
        "tie_word_embeddings": True,
        "use_bias": True,
        "rope_theta": 10_000.0,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    neutral={"partial_rotary_factor": 1.0},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=names_with(
        {"model.layers.*.mlp.c_fc": ("layers.*.mlp.up_proj",), "model.layers.*.mlp.c_proj": ("layers.*.mlp.down_proj",)}
    ),
)
