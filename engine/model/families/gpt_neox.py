"""GPT-NeoX and Pythia: LayerNorm, heads turned in part, attention and feed-forward side by side on a norm each.

q, k and v are stored as one, head by head; the head is called `embed_out`. Without `use_parallel_residual` the branches
follow each other. Class defaults are those of transformers 5.23 `GPTNeoXConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.rotary import read_rope
from trine.engine.model.families.settings import read_decoder, write_decoder


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    named = {"rope_theta": hf.get("rotary_emb_base"), "partial_rotary_factor": hf.get("rotary_pct")}
    rope = read_rope({**hf, **named}, partial=True)
    bias, drop = bool(hf["attention_bias"]), float(hf.get("hidden_dropout") or 0.0)
    dropout = DropoutConfig(embedding=drop, attention=float(hf.get("attention_dropout") or 0.0), residual=drop)
    return read_decoder(
        {**hf, "head_dim": None, "num_key_value_heads": None}, "gpt_neox", eps="layer_norm_eps", norm="layer",
        rope=rope, placement="parallel_two" if hf["use_parallel_residual"] else "pre", mlp="plain", qkv_bias=bias,
        o_bias=bias, mlp_bias=True, dropout=dropout,
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.rope is not None
    hf = write_decoder(config, eps="layer_norm_eps")
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "partial_rotary_factor"):
        hf.pop(key, None)
    hf["rope_parameters"]["partial_rotary_factor"] = config.rope.partial
    return {
        **hf,
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": config.rope.partial,
        "use_parallel_residual": config.placement == "parallel_two",
        "attention_bias": config.qkv_bias,
        "hidden_dropout": config.dropout.residual,
    }


_MODULES = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.dense_h_to_4h": ("mlp.up_proj",),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}
GPT_NEOX = Family(
    name="gpt_neox",
    title="GPT-NeoX, Pythia",
    model_types=("gpt_neox",),
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_emb_base": 10_000.0,
        "rotary_pct": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    neutral={},
    ignored=(r"layers\.\d+\.attention\.(masked_)?bias", r"layers\.\d+\.attention\.rotary_emb\.inv_freq"),
    to_config=to_config,
    to_hf=to_hf,
    names={
        "gpt_neox.embed_in": ("embed_tokens",),
        **{
            f"gpt_neox.layers.*.{stored}": tuple(f"layers.*.{module}" for module in ours)
            for stored, ours in _MODULES.items()
        },
        "gpt_neox.final_layer_norm": ("norm",),
        "embed_out": ("lm_head",),
    },
    by_head=frozenset({"gpt_neox.layers.*.attention.query_key_value"}),
    head="embed_out",
)
