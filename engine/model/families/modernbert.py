"""ModernBERT: norms before the branches but none before the first attention, rotary positions, gated GELU, few biases.

Every third layer sees everything and turns at its own theta; the others see `local_attention` // 2 tokens on each side.
Class defaults are those of transformers 5.23 `ModernBertConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.encoder import read_head, write_head
from trine.engine.model.families.rotary import read_two_ropes, write_two_ropes
from trine.engine.model.families.settings import (
    read_activation,
    read_decoder,
    read_windows,
    require,
    write_activation,
    write_decoder,
    write_windows,
)
from trine.engine.model.head_config import Task, TransformConfig

_TASKS: dict[Task, str] = {
    "masked_lm": "ModernBertForMaskedLM",
    "classification": "ModernBertForSequenceClassification",
    "tagging": "ModernBertForTokenClassification",
    "features": "ModernBertModel",
}


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    width, num_heads = require(hf, "hidden_size"), require(hf, "num_attention_heads")
    if width % num_heads:
        raise CheckpointError(
            f"config.json has hidden_size {width}, which is not a multiple of num_attention_heads {num_heads}"
        )
    period, sides = hf["global_attn_every_n_layers"], hf["local_attention"] // 2
    windows = read_windows({**hf, "sliding_window": 2 * sides + 1}, is_full=lambda layer: layer % period == 0)
    ropes = read_two_ropes(
        {**hf, "rope_theta": hf["global_rope_theta"]}, window_theta=hf["local_rope_theta"], windows=windows
    )
    transform = TransformConfig(
        activation=read_activation(hf, "classifier_activation"), bias=bool(hf["classifier_bias"])
    )
    head = read_head(hf, _TASKS, vocabulary=transform, classes=transform, pooling=hf["classifier_pooling"])
    dropout = DropoutConfig(
        embedding=float(hf["embedding_dropout"] or 0.0),
        attention=float(hf["attention_dropout"] or 0.0),
        residual=float(hf["mlp_dropout"] or 0.0),
    )
    named = {"num_key_value_heads": None, "head_dim": None}
    return read_decoder(
        {**hf, **named}, "modernbert", eps="norm_eps", activation="hidden_activation", causal=False, first_norm=False,
        embedding_norm=True, norm="layer" if hf["norm_bias"] else "layer_unbiased", qkv_bias=bool(hf["attention_bias"]),
        o_bias=bool(hf["attention_bias"]), mlp_bias=bool(hf["mlp_bias"]), head_bias=bool(hf["decoder_bias"]),
        dropout=dropout, head=head, **windows, **ropes,
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    hf = {
        **write_decoder(config, eps="norm_eps", activation="hidden_activation"),
        **write_windows(config),
        **write_two_ropes(config),
    }
    for key in ("num_key_value_heads", "head_dim", "sliding_window", "rope_theta", "rope_scaling", "use_cache"):
        hf.pop(key, None)
    assert config.rope is not None
    local = config.rope if config.window_rope is None else config.window_rope
    full = tuple(layer for layer in range(config.num_layers) if config.window_of(layer) is None)
    periods = [
        period for period in range(1, config.num_layers + 1) if full == tuple(range(0, config.num_layers, period))
    ]
    head = config.head
    transform = None if head is None else head.transform
    return {
        **hf,
        **write_head(config),
        # transformers 4 knows the pattern and the thetas by these alone.
        **({"global_attn_every_n_layers": periods[-1]} if periods else {}),
        "global_rope_theta": config.rope.theta,
        "local_rope_theta": local.theta,
        "local_attention": 128 if config.window is None else config.window - 1,
        "norm_bias": config.norm == "layer",
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "decoder_bias": config.head_bias,
        "classifier_bias": False if transform is None else transform.bias,
        "classifier_activation": "gelu" if transform is None else write_activation(transform.activation),  # type: ignore[arg-type]
        "classifier_pooling": "cls" if head is None else head.pooling,
        "classifier_dropout": 0.0 if head is None else head.dropout,
        "embedding_dropout": config.dropout.embedding,
        "mlp_dropout": config.dropout.residual,
    }


_HEAD = {"head.dense": ("head.transform.dense",), "head.norm": ("head.transform.norm",)}
_CLASSIFIER = {**_HEAD, "classifier": ("head.classifier",)}
_LAYER = {
    "attn_norm": ("input_layernorm",),
    "attn.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.Wo": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.Wi": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.Wo": ("mlp.down_proj",),
}
MODERNBERT = Family(
    name="modernbert",
    title="ModernBERT",
    model_types=("modernbert",),
    architecture=_TASKS["masked_lm"],
    tasks=_TASKS,
    prefix="model.",
    defaults={
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "embedding_dropout": 0.0,
        "decoder_bias": True,
        "classifier_pooling": "cls",
        "classifier_dropout": 0.0,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "pad_token_id": 50283,
        "bos_token_id": 50281,
        "eos_token_id": 50282,
    },
    neutral={"sparse_prediction": False, "rope_scaling": None},
    to_config=to_config,
    to_hf=to_hf,
    names={
        "model.embeddings.tok_embeddings": ("embed_tokens",),
        "model.embeddings.norm": ("embed_norm",),
        **{
            f"model.layers.*.{stored}": tuple(f"layers.*.{module}" for module in ours)
            for stored, ours in _LAYER.items()
        },
        "model.final_norm": ("norm",),
    },
    task_names={
        "masked_lm": {**_HEAD, "decoder": ("lm_head",), "decoder.bias": ("lm_bias",)},
        "classification": _CLASSIFIER,
        "tagging": _CLASSIFIER,
        "features": {},
    },
    head="decoder",
)
