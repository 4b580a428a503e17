"""T5 1.0, T5 1.1, Flan-T5 and mT5: encoder-decoders with relative positions.

RMSNorm before each branch, scores not scaled, a plain ReLU or a gated feed-forward, no biases. T5 1.0 has one matrix
for embedding and head and multiplies the hidden states by width ** -0.5 before the head; 1.1, Flan and mT5 have a head
of their own and do not. Older files say so by `tie_word_embeddings`; transformers 5 writes true there always, ties by
what the file holds, and keeps the other half in `scale_decoder_outputs`. mT5 never scales. Both are written.

Class defaults are those of transformers 5.23 `T5Config` and `MT5Config`. Old files repeat the embedding under the names
of both stacks, and carry a bias of cross-attention that is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import DropoutConfig, EncoderConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.settings import (
    ACTIVATION_NAMES,
    read_eos,
    read_targets,
    require,
    write_eos,
    write_targets,
)


def _to_config(family: str) -> Callable[[HfConfig], ModelConfig]:
    def to_config(hf: HfConfig) -> ModelConfig:
        """config.json (with the family's defaults filled in) to ModelConfig."""
        width, heads, layers = require(hf, "d_model"), require(hf, "num_heads"), require(hf, "num_layers")
        gated, activation = _feed_forward(hf)
        tied = hf.get("tie_word_embeddings") is not False
        scaled = family == "t5" and bool(hf.get("scale_decoder_outputs", tied))
        rate = float(hf.get("dropout_rate") or 0.0)
        return ModelConfig(
            family=family,
            vocab_size=require(hf, "vocab_size"),
            width=width,
            num_layers=hf.get("num_decoder_layers") or layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=require(hf, "d_kv"),
            ffn_width=require(hf, "d_ff"),
            max_positions=require(hf, "n_positions"),
            norm_eps=require(hf, "layer_norm_epsilon"),
            positions="relative",
            rope=None,
            relative_buckets=require(hf, "relative_attention_num_buckets"),
            relative_max_distance=require(hf, "relative_attention_max_distance"),
            attention_scale=1.0,
            mlp="gated" if gated else "plain",
            activation=ACTIVATION_NAMES[activation],
            tie_embeddings=tied,
            logit_scale=width**-0.5 if scaled else 1.0,
            encoder=EncoderConfig(num_layers=layers, num_heads=heads, ffn_width=require(hf, "d_ff")),
            dropout=DropoutConfig(embedding=rate, attention=rate, residual=rate),
            init_std=require(hf, "initializer_factor"),
            init_fan_in=True,
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=read_eos(hf),
            pad_token_id=hf.get("pad_token_id"),
            # Some files leave out that a target begins with padding.
            decoder_start_token_id=next(
                (hf[key] for key in ("decoder_start_token_id", "pad_token_id") if hf.get(key) is not None), None
            ),
            **read_targets(hf),
        )

    return to_config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    assert config.encoder is not None
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    # "gated-gelu" is read as the tanh form, so the exact one has no name of its own.
    feed_forward = {"gated-gelu_new": "gated-gelu"}.get(f"gated-{activation}", f"gated-{activation}")
    gated = config.mlp == "gated"
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_width,
        "num_heads": config.num_heads,
        "num_layers": config.encoder.num_layers,
        "num_decoder_layers": config.num_layers,
        "n_positions": config.max_positions,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": feed_forward if gated else activation,
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.logit_scale != 1.0,
        "dropout_rate": config.dropout.residual,
        "classifier_dropout": 0.0,
        "initializer_factor": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **write_targets(config),
        "is_encoder_decoder": True,
        "is_decoder": False,
        "use_cache": True,
    }


def _feed_forward(hf: HfConfig) -> tuple[bool, str]:
    """Whether it is gated, and its activation, of `feed_forward_proj`."""
    name = str(require(hf, "feed_forward_proj"))
    activation = name.removeprefix("gated-")
    if activation not in ACTIVATION_NAMES:
        raise CheckpointError(
            f"config.json has feed_forward_proj {name!r}; supported: one of {', '.join(ACTIVATION_NAMES)}, or gated- "
            "before it"
        )
    return name != activation, "gelu_new" if name == "gated-gelu" else activation


_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_FEED_FORWARD = {"wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def _names(gated: bool) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {"shared": ("embed_tokens",), "lm_head": ("lm_head",)}
    for stored, ours, last in (("encoder", "encoder.", 1), ("decoder", "", 2)):
        block, layer = f"{stored}.block.*.layer", f"{ours}layers.*"
        names[f"{stored}.block.0.layer.0.SelfAttention.relative_attention_bias"] = (f"{ours}relative_bias",)
        names |= {f"{block}.0.SelfAttention.{one}": (f"{layer}.self_attn.{two}",) for one, two in _ATTENTION.items()}
        names[f"{block}.0.layer_norm"] = (f"{layer}.input_layernorm",)
        if stored == "decoder":
            names |= {
                f"{block}.1.EncDecAttention.{one}": (f"{layer}.cross_attn.{two}",) for one, two in _ATTENTION.items()
            }
            names[f"{block}.1.layer_norm"] = (f"{layer}.cross_attention_layernorm",)
        for one, two in _FEED_FORWARD.items():
            if (one == "wi") != gated or one == "wo":
                names[f"{block}.{last}.DenseReluDense.{one}"] = (f"{layer}.mlp.{two}",)
        names[f"{block}.{last}.layer_norm"] = (f"{layer}.post_attention_layernorm",)
        names[f"{stored}.final_layer_norm"] = (f"{ours}norm",)
    return names


def _family(name: str, title: str, architecture: str, **defaults: Any) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=(name,),
        architecture=architecture,
        prefix="",
        defaults={
            "d_model": 512,
            "d_kv": 64,
            "num_layers": 6,
            "num_heads": 8,
            "n_positions": 512,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "initializer_factor": 1.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            **defaults,
        },
        neutral={"is_encoder_decoder": True},
        to_config=_to_config(name),
        to_hf=to_hf,
        names=_names(False),
        gated_names=_names(True),
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        copies={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
    )


T5 = _family("t5", "T5 1.0, T5 1.1, Flan-T5", "T5ForConditionalGeneration", d_ff=2048, feed_forward_proj="relu")
MT5 = _family(
    "mt5", "mT5", "MT5ForConditionalGeneration", d_ff=1024, num_heads=6, num_layers=8, feed_forward_proj="gated-gelu"
)
