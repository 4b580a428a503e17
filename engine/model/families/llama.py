"""Llama 2, 3, 3.1, 3.2 and what shares its format (TinyLlama, SmolLM, SmolLM2).

RMSNorm before each branch, rotary positions (default, linear or llama3 scaling), grouped key/value heads, SwiGLU.
`attention_bias` puts a bias on q, k, v and o; `mlp_bias` on all three of the feed-forward. Class defaults are those of
transformers 5.23 `LlamaConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import (
    Family,
    HfConfig,
    TensorRule,
    read_activation,
    read_eos,
    read_rope,
    require,
    write_activation,
    write_eos,
    write_rope,
)


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    num_heads = require(hf, "num_attention_heads")
    width = require(hf, "hidden_size")
    return ModelConfig(
        family="llama",
        vocab_size=require(hf, "vocab_size"),
        width=width,
        num_layers=require(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or width // num_heads,
        ffn_width=require(hf, "intermediate_size"),
        max_positions=require(hf, "max_position_embeddings"),
        norm="rms",
        norm_eps=require(hf, "rms_norm_eps"),
        positions="rope",
        rope=read_rope(hf, default_theta=10_000.0),
        qkv_bias=bool(hf.get("attention_bias")),
        o_bias=bool(hf.get("attention_bias")),
        mlp="gated",
        activation=read_activation(hf, "hidden_act"),
        mlp_bias=bool(hf.get("mlp_bias")),
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        dropout=DropoutConfig(attention=float(hf.get("attention_dropout") or 0.0)),
        init_std=require(hf, "initializer_range"),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=read_eos(hf),
        pad_token_id=hf.get("pad_token_id"),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.rope is not None
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope),
        "attention_bias": config.qkv_bias,
        "attention_dropout": config.dropout.attention,
        "hidden_act": write_activation(config.activation),
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }


def rules(config: ModelConfig) -> list[TensorRule]:
    """Our names are a Llama file's, without the prefix."""
    linears = ["self_attn.o_proj"] if not config.o_bias else []
    biased = ["self_attn.o_proj"] if config.o_bias else []
    (biased if config.qkv_bias else linears).extend(f"self_attn.{name}_proj" for name in "qkv")
    (biased if config.mlp_bias else linears).extend(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    parts = [f"{name}.weight" for name in linears + biased] + [f"{name}.bias" for name in biased]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    if config.qk_norm == "head":
        parts += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    names = ["embed_tokens.weight", "norm.weight"]
    names += [f"layers.{layer}.{part}" for layer in range(config.num_layers) for part in parts]
    found = [TensorRule(f"model.{name}", (name,)) for name in names]
    return found if config.tie_embeddings else [*found, TensorRule("lm_head.weight", ("lm_head.weight",))]


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    neutral={"partial_rotary_factor": 1.0},
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
    to_config=to_config,
    to_hf=to_hf,
    rules=rules,
)
