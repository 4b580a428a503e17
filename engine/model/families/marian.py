"""Marian (OPUS-MT), the nearest to the first Transformer (Vaswani et al. 2017): an encoder-decoder for translation.

LayerNorm after each residual sum, sinusoids that are not stored, one matrix for both embeddings and the head,
embeddings times sqrt(width), biases everywhere, one for each logit among them. A target begins with the padding id.
Class defaults are those of transformers 5.23 `MarianConfig`; LayerNorm's epsilon is no setting.
"""

from __future__ import annotations

from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import DropoutConfig, EncoderConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.settings import (
    read_activation,
    read_eos,
    read_targets,
    require,
    write_eos,
    write_targets,
)

_EPS = 1e-5


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    width, heads, vocab_size = require(hf, "d_model"), require(hf, "decoder_attention_heads"), require(hf, "vocab_size")
    if (hf.get("decoder_vocab_size") or vocab_size) != vocab_size:
        raise CheckpointError(
            f"config.json has decoder_vocab_size {hf['decoder_vocab_size']} and vocab_size {vocab_size}; source and "
            "target must share one vocabulary"
        )
    for key in ("encoder_attention_heads", "decoder_attention_heads"):
        if width % require(hf, key):
            raise CheckpointError(f"config.json has d_model {width}, which is not a multiple of {key} {hf[key]}")
    rate = float(hf.get("dropout") or 0.0)
    return ModelConfig(
        family="marian",
        vocab_size=vocab_size,
        width=width,
        num_layers=require(hf, "decoder_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffn_width=require(hf, "decoder_ffn_dim"),
        max_positions=require(hf, "max_position_embeddings"),
        norm="layer",
        norm_eps=_EPS,
        placement="post_sum",
        final_norm=False,
        positions="sinusoidal",
        rope=None,
        qkv_bias=True,
        o_bias=True,
        mlp="plain",
        activation=read_activation(hf, "activation_function"),
        mlp_bias=True,
        tie_embeddings=True,
        head_bias=True,
        embedding_scale=width**0.5 if hf.get("scale_embedding") else 1.0,
        encoder=EncoderConfig(
            num_layers=require(hf, "encoder_layers"),
            num_heads=require(hf, "encoder_attention_heads"),
            ffn_width=require(hf, "encoder_ffn_dim"),
        ),
        dropout=DropoutConfig(embedding=rate, attention=float(hf.get("attention_dropout") or 0.0), residual=rate),
        init_std=require(hf, "init_std"),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=read_eos(hf),
        pad_token_id=hf.get("pad_token_id"),
        decoder_start_token_id=hf.get("decoder_start_token_id"),
        **read_targets(hf),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.encoder is not None
    return {
        "vocab_size": config.vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": config.tie_embeddings,
        "d_model": config.width,
        "encoder_layers": config.encoder.num_layers,
        "encoder_attention_heads": config.encoder.num_heads,
        "encoder_ffn_dim": config.encoder.ffn_width,
        "decoder_layers": config.num_layers,
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.ffn_width,
        "num_hidden_layers": config.encoder.num_layers,
        "max_position_embeddings": config.max_positions,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "scale_embedding": config.embedding_scale != 1.0,
        "dropout": config.dropout.residual,
        "attention_dropout": config.dropout.attention,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **write_targets(config),
        "is_encoder_decoder": True,
        "is_decoder": False,
        "use_cache": True,
    }


_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
_MODULES = {
    **{f"self_attn.{stored}": f"self_attn.{ours}" for stored, ours in _ATTENTION.items()},
    "self_attn_layer_norm": "post_attention_layernorm",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_layer_norm": "post_feedforward_layernorm",
}
_CROSS = {
    **{f"encoder_attn.{stored}": f"cross_attn.{ours}" for stored, ours in _ATTENTION.items()},
    "encoder_attn_layer_norm": "cross_attention_layernorm",
}


MARIAN = Family(
    name="marian",
    title="Marian, OPUS-MT",
    model_types=("marian",),
    architecture="MarianMTModel",
    prefix="model.",
    defaults={
        "vocab_size": 58101,
        "d_model": 1024,
        "encoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_layers": 12,
        "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "dropout": 0.1,
        "init_std": 0.02,
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "decoder_start_token_id": 58100,
        "forced_eos_token_id": 0,
    },
    neutral={
        "is_encoder_decoder": True,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "static_position_embeddings": True,
    },
    ignored=(r"(encoder|decoder)\.embed_positions\.weight",),
    copies={f"model.{stack}.embed_tokens.weight": "model.shared.weight" for stack in ("encoder", "decoder")},
    to_config=to_config,
    to_hf=to_hf,
    names={
        "model.shared": ("embed_tokens",),
        **{
            f"model.{stack}.layers.*.{stored}": (f"{ours}layers.*.{module}",)
            for stack, ours, modules in (
                ("encoder", "encoder.", _MODULES),
                ("decoder", "", {**_MODULES, **_CROSS}),
            )
            for stored, module in modules.items()
        },
        "final_logits_bias": ("lm_bias",),
        "lm_head": ("lm_head",),
    },
    as_rows=frozenset({"final_logits_bias"}),
)
