"""DistilBERT: BERT without kinds of tokens, under names of its own.

A classifier has a layer with ReLU of its own in the place of the pooler; hidden states alone have none. The epsilon of
the norms is BERT's and stands in no file. Class defaults are those of transformers 5.23 `DistilBertConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.encoder import BERT_DEFAULTS, read_bert, read_head, read_task, write_bert
from trine.engine.model.families.settings import read_activation, require
from trine.engine.model.head_config import Task, TransformConfig

_TASKS: dict[Task, str] = {
    "masked_lm": "DistilBertForMaskedLM",
    "classification": "DistilBertForSequenceClassification",
    "tagging": "DistilBertForTokenClassification",
    "features": "DistilBertModel",
}
# Keys of config.json, and what BERT calls them.
_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
# What BERT's config.json says and this one does not.
_BERTS_OWN = (
    *_KEYS.values(), "layer_norm_eps", "type_vocab_size", "classifier_dropout", "is_decoder", "add_cross_attention",
    "position_embedding_type", "use_cache",
)  # fmt: skip
_EPS = BERT_DEFAULTS["layer_norm_eps"]


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    named = {bert: require(hf, key) for key, bert in _KEYS.items()}
    if read_task(hf, _TASKS) == "classification":
        named["classifier_dropout"] = hf["seq_classif_dropout"]
    as_bert = {**hf, **named, "layer_norm_eps": _EPS, "type_vocab_size": 0}
    transform = TransformConfig(activation=read_activation(as_bert, "hidden_act"))
    head = read_head(as_bert, _TASKS, vocabulary=transform, pooler=("classification",), pooler_activation="relu")
    return read_bert(as_bert, "distilbert", head)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    as_bert = write_bert(config)
    hf = {key: as_bert[bert] for key, bert in _KEYS.items()}
    if config.head is not None and config.head.task == "classification":
        hf["seq_classif_dropout"] = config.head.dropout
    return {**{key: value for key, value in as_bert.items() if key not in _BERTS_OWN}, **hf}


DISTILBERT = Family(
    name="distilbert",
    title="DistilBERT",
    model_types=("distilbert",),
    architecture=_TASKS["masked_lm"],
    tasks=_TASKS,
    prefix="distilbert.",
    defaults={
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "activation": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    neutral={"sinusoidal_pos_embds": False, "pruned_heads": {}, "tie_word_embeddings": True},
    to_config=to_config,
    to_hf=to_hf,
    names={
        "distilbert.embeddings.word_embeddings": ("embed_tokens",),
        "distilbert.embeddings.position_embeddings": ("embed_positions",),
        "distilbert.embeddings.LayerNorm": ("embed_norm",),
        "distilbert.transformer.layer.*.attention.q_lin": ("layers.*.self_attn.q_proj",),
        "distilbert.transformer.layer.*.attention.k_lin": ("layers.*.self_attn.k_proj",),
        "distilbert.transformer.layer.*.attention.v_lin": ("layers.*.self_attn.v_proj",),
        "distilbert.transformer.layer.*.attention.out_lin": ("layers.*.self_attn.o_proj",),
        "distilbert.transformer.layer.*.sa_layer_norm": ("layers.*.post_attention_layernorm",),
        "distilbert.transformer.layer.*.ffn.lin1": ("layers.*.mlp.up_proj",),
        "distilbert.transformer.layer.*.ffn.lin2": ("layers.*.mlp.down_proj",),
        "distilbert.transformer.layer.*.output_layer_norm": ("layers.*.post_feedforward_layernorm",),
    },
    task_names={
        "masked_lm": {
            "vocab_transform": ("head.transform.dense",),
            "vocab_layer_norm": ("head.transform.norm",),
            "vocab_projector.bias": ("lm_bias",),
        },
        "classification": {"pre_classifier": ("head.pooler",), "classifier": ("head.classifier",)},
        "tagging": {"classifier": ("head.classifier",)},
        "features": {},
    },
    head="vocab_projector",
)
