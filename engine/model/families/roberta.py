"""RoBERTa and what shares its layout (XLM-RoBERTa, CamemBERT): BERT with another count of positions and other heads.

Positions are rows from `pad_token_id` + 1 on; a padding id has the row before and is not counted, wherever it stands.
The layer before the vocabulary has GELU (erf) whatever `hidden_act` says. A classifier has a layer with tanh of its own
in the place of the pooler. Class defaults are those of transformers 5.23 `RobertaConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trine.engine.errors import CheckpointError
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
from trine.engine.model.families.settings import require
from trine.engine.model.head_config import Task, TransformConfig

_POOLER = {"roberta.pooler.dense": ("head.pooler",)}


def roberta_family(name: str, *, title: str, model_type: str, class_name: str) -> Family:
    """A family in RoBERTa's layout, whose classes in transformers begin with `class_name`."""
    tasks: dict[Task, str] = {
        "masked_lm": f"{class_name}ForMaskedLM",
        "classification": f"{class_name}ForSequenceClassification",
        "tagging": f"{class_name}ForTokenClassification",
        "features": f"{class_name}Model",
    }
    return Family(
        name=name,
        title=title,
        model_types=(model_type,),
        architecture=tasks["masked_lm"],
        tasks=tasks,
        prefix="roberta.",
        defaults={**BERT_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        neutral=BERT_NEUTRAL,
        ignored=(r"embeddings\.(position_ids|token_type_ids)",),
        renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
        copies={"lm_head.decoder.bias": "lm_head.bias"},
        to_config=lambda hf: _to_config(hf, name, tasks),
        to_hf=_to_hf,
        names={
            "roberta.embeddings.word_embeddings": ("embed_tokens",),
            "roberta.embeddings.position_embeddings": ("embed_positions",),
            "roberta.embeddings.token_type_embeddings": ("embed_types",),
            "roberta.embeddings.LayerNorm": ("embed_norm",),
            **{f"roberta.encoder.layer.*.{stored}": (f"layers.*.{module}",) for stored, module in BERT_LAYER.items()},
        },
        task_names={
            "masked_lm": {
                "lm_head.dense": ("head.transform.dense",),
                "lm_head.layer_norm": ("head.transform.norm",),
                "lm_head.bias": ("lm_bias",),
            },
            "classification": {"classifier.dense": ("head.pooler",), "classifier.out_proj": ("head.classifier",)},
            "tagging": {"classifier": ("head.classifier",)},
            "features": _POOLER,
        },
        head="lm_head.decoder",
    )


def _to_config(hf: HfConfig, name: str, tasks: Mapping[Task, str]) -> ModelConfig:
    """config.json (with the family's defaults filled in) to ModelConfig."""
    offset, rows = require(hf, "pad_token_id") + 1, require(hf, "max_position_embeddings")
    if rows <= offset:
        raise CheckpointError(
            f"config.json has max_position_embeddings {rows}, of which {offset} stand before the text"
        )
    head = read_head(hf, tasks, vocabulary=TransformConfig(), pooler=("classification", "features"))
    named = {"max_position_embeddings": rows - offset}
    return read_bert({**hf, **named}, name, head, position_offset=offset, pad_has_no_position=True)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig to config.json (without the keys common to all families)."""
    return {**write_bert(config), "max_position_embeddings": config.max_positions + config.position_offset}


ROBERTA = roberta_family("roberta", title="RoBERTa", model_type="roberta", class_name="Roberta")
XLM_ROBERTA = roberta_family("xlm_roberta", title="XLM-RoBERTa", model_type="xlm-roberta", class_name="XLMRoberta")
CAMEMBERT = roberta_family("camembert", title="CamemBERT", model_type="camembert", class_name="Camembert")
