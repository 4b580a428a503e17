"""GPT-2: LayerNorm, learned positions, biases everywhere, GELU (tanh form), tied embeddings.

Its linear layers are stored [in, out], and q, k, v as one matrix c_attn. Files carry the causal masks of an old
implementation, which hold no information. Class defaults are those of transformers 5.23 `GPT2Config`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.settings import read_activation, read_eos, require, write_eos


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    width, num_heads = require(hf, "n_embd"), require(hf, "n_head")
    if width % num_heads:
        raise CheckpointError(f"config.json has n_embd {width}, which is not a multiple of n_head {num_heads}")
    return ModelConfig(
        family="gpt2",
        vocab_size=require(hf, "vocab_size"),
        width=width,
        num_layers=require(hf, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        ffn_width=hf.get("n_inner") or 4 * width,
        max_positions=require(hf, "n_positions"),
        norm="layer",
        norm_eps=require(hf, "layer_norm_epsilon"),
        positions="learned",
        rope=None,
        qkv_bias=True,
        o_bias=True,
        mlp="plain",
        activation=read_activation(hf, "activation_function"),
        mlp_bias=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        dropout=DropoutConfig(
            embedding=float(hf.get("embd_pdrop") or 0.0),
            attention=float(hf.get("attn_pdrop") or 0.0),
            residual=float(hf.get("resid_pdrop") or 0.0),
        ),
        init_std=require(hf, "initializer_range"),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=read_eos(hf),
        pad_token_id=hf.get("pad_token_id"),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_width,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.dropout.embedding,
        "attn_pdrop": config.dropout.attention,
        "resid_pdrop": config.dropout.residual,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "add_cross_attention": False,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "use_cache": True,
    }


_LINEARS = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
_NORMS = {"ln_1": ("input_layernorm",), "ln_2": ("post_attention_layernorm",)}


GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    defaults={
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    neutral={
        "add_cross_attention": False,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    to_config=to_config,
    to_hf=to_hf,
    names={
        "transformer.wte": ("embed_tokens",),
        "transformer.wpe": ("embed_positions",),
        **{
            f"transformer.h.*.{stored}": tuple(f"layers.*.{module}" for module in ours)
            for stored, ours in {**_NORMS, **_LINEARS}.items()
        },
        "transformer.ln_f": ("norm",),
        "lm_head": ("lm_head",),
    },
    transposed=frozenset(f"transformer.h.*.{stored}" for stored in _LINEARS),
)
