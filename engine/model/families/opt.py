"""OPT: LayerNorm, learned positions whose table begins two rows early, ReLU, biases everywhere.

In OPT-350m norms stand behind the sum with each branch, none at the end, and embedding and head are narrower than the
layers. Class defaults are those of transformers 5.23 `OPTConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig, Names
from trine.engine.model.families.settings import read_decoder, require, write_decoder

_OFFSET = 2


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    width = require(hf, "hidden_size")
    narrow, before = hf.get("word_embed_proj_dim") or width, bool(hf["do_layer_norm_before"])
    named = {
        "intermediate_size": require(hf, "ffn_dim"),
        "initializer_range": hf["init_std"],
        "layer_norm_eps": 1e-5,
        "head_dim": None,
        "num_key_value_heads": None,
    }
    bias = bool(hf["enable_bias"])
    dropout = DropoutConfig(
        attention=float(hf.get("attention_dropout") or 0.0), residual=float(hf.get("dropout") or 0.0)
    )
    return read_decoder(
        {**hf, **named}, "opt", eps="layer_norm_eps", activation="activation_function", norm="layer",
        positions="learned", position_offset=_OFFSET, rope=None, mlp="plain", qkv_bias=bias, o_bias=bias, mlp_bias=bias,
        dropout=dropout, embedding_width=None if narrow == width else narrow, placement="pre" if before else "post_sum",
        final_norm=before and not hf.get("_remove_final_layer_norm"),
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    hf = write_decoder(config, eps="layer_norm_eps", activation="activation_function")
    for key in ("layer_norm_eps", "head_dim", "num_key_value_heads", "intermediate_size", "initializer_range"):
        del hf[key]
    return {
        **hf,
        "ffn_dim": config.ffn_width,
        "init_std": config.init_std,
        "word_embed_proj_dim": config.embedding_width or config.width,
        "enable_bias": config.qkv_bias,
        "dropout": config.dropout.residual,
        "layerdrop": 0.0,
        "do_layer_norm_before": config.placement == "pre",
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": config.placement == "pre" and not config.final_norm,
    }


_MODULES = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}


def _names(norm_of_attention: str, norm_of_feed_forward: str) -> Names:
    norms = {"self_attn_layer_norm": norm_of_attention, "final_layer_norm": norm_of_feed_forward}
    return {
        "model.decoder.embed_tokens": ("embed_tokens",),
        "model.decoder.embed_positions": ("embed_positions",),
        "model.decoder.project_in": ("embed_in",),
        "model.decoder.project_out": ("embed_out",),
        **{f"model.decoder.layers.*.{stored}": (f"layers.*.{ours}",) for stored, ours in {**_MODULES, **norms}.items()},
        "model.decoder.final_layer_norm": ("norm",),
        "lm_head": ("lm_head",),
    }


OPT = Family(
    name="opt",
    title="OPT",
    model_types=("opt",),
    architecture="OPTForCausalLM",
    prefix="model.",
    defaults={
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "init_std": 0.02,
        "tie_word_embeddings": True,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "dropout": 0.1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    neutral={
        "layer_norm_elementwise_affine": True,
    },
    to_config=to_config,
    to_hf=to_hf,
    names=_names("input_layernorm", "post_attention_layernorm"),
    post_sum_names=_names("post_attention_layernorm", "post_feedforward_layernorm"),
)
