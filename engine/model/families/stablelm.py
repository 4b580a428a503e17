"""StableLM: LayerNorm, heads turned in part, SwiGLU; with `use_parallel_residual` both branches on one norm.

`use_qkv_bias` puts a bias on q, k and v; `qk_layernorm` norms each head of q and k by a module of its own. Class
defaults are those of transformers 5.23 `StableLmConfig`.
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
        attention=float(hf.get("attention_dropout") or 0.0), residual=float(hf.get("hidden_dropout") or 0.0)
    )
    return read_decoder(
        {**hf, "head_dim": None}, "stablelm", eps="layer_norm_eps", norm="layer", rope=read_rope(hf, partial=True),
        placement="parallel" if hf["use_parallel_residual"] else "pre", qkv_bias=bool(hf["use_qkv_bias"]),
        dropout=dropout, qk_norm="each_head" if hf.get("qk_layernorm") else None,
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.rope is not None
    hf = write_decoder(config, eps="layer_norm_eps")
    hf["rope_parameters"]["partial_rotary_factor"] = hf["partial_rotary_factor"] = config.rope.partial
    return {
        **hf,
        "use_parallel_residual": config.placement == "parallel",
        "use_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm is not None,
        "hidden_dropout": config.dropout.residual,
    }


STABLELM = Family(
    name="stablelm",
    title="StableLM",
    model_types=("stablelm",),
    architecture="StableLmForCausalLM",
    prefix="model.",
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    neutral={},
    ignored=FREQUENCIES,
    to_config=to_config,
    to_hf=to_hf,
    names=names_with(
        {
            f"model.layers.*.self_attn.{part}_layernorm.norms.%": (f"layers.*.self_attn.{part}_norm",)
            for part in ("q", "k")
        }
    ),
)
