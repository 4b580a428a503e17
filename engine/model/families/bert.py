"""BERT: norms after the residual sums, learned positions, kinds of tokens, a norm after the embedding, GELU (erf).

Files of a base class may lack the pooler. Old ones name the parameters of norms gamma and beta. Class defaults are
those of transformers 5.23 `BertConfig`.
"""

from __future__ import annotations

from typing import Any

from trine.engine.model.config import ModelConfig
from trine.engine.model.families.base import Family, HfConfig
from trine.engine.model.families.encoder import (
    BERT_DEFAULTS,
    BERT_LAYER,
    BERT_NEUTRAL,
    read_bert,
    read_head,
    write_bert,
)
from trine.engine.model.families.settings import read_activation
from trine.engine.model.head_config import Task, TransformConfig

_TASKS: dict[Task, str] = {
    "masked_lm": "BertForMaskedLM",
    "pretraining": "BertForPreTraining",
    "classification": "BertForSequenceClassification",
    "tagging": "BertForTokenClassification",
    "features": "BertModel",
}


def to_config(hf: HfConfig) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    head = read_head(
        hf,
        _TASKS,
        vocabulary=TransformConfig(activation=read_activation(hf, "hidden_act")),
        pooler=("pretraining", "classification", "features"),
    )
    return read_bert(hf, "bert", head)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return write_bert(config)


_POOLER = {"bert.pooler.dense": ("head.pooler",)}
_VOCABULARY = {
    "cls.predictions.transform.dense": ("head.transform.dense",),
    "cls.predictions.transform.LayerNorm": ("head.transform.norm",),
    "cls.predictions.bias": ("lm_bias",),
}
BERT = Family(
    name="bert",
    title="BERT",
    model_types=("bert",),
    architecture=_TASKS["masked_lm"],
    tasks=_TASKS,
    prefix="bert.",
    defaults=BERT_DEFAULTS,
    neutral=BERT_NEUTRAL,
    ignored=(r"embeddings\.(position_ids|token_type_ids)",),
    renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    to_config=to_config,
    to_hf=to_hf,
    names={
        "bert.embeddings.word_embeddings": ("embed_tokens",),
        "bert.embeddings.position_embeddings": ("embed_positions",),
        "bert.embeddings.token_type_embeddings": ("embed_types",),
        "bert.embeddings.LayerNorm": ("embed_norm",),
        **{f"bert.encoder.layer.*.{stored}": (f"layers.*.{module}",) for stored, module in BERT_LAYER.items()},
    },
    task_names={
        "masked_lm": _VOCABULARY,
        "pretraining": {**_POOLER, **_VOCABULARY, "cls.seq_relationship": ("head.next_sentence_output",)},
        "classification": {**_POOLER, "classifier": ("head.classifier",)},
        "tagging": {"classifier": ("head.classifier",)},
        "features": _POOLER,
    },
    head="cls.predictions.decoder",
)
