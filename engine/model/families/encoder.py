"""What families of encoders share in config.json: the task, named by the class in `architectures`, and its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trine.engine.errors import CheckpointError
from trine.engine.model.config import DropoutConfig, ModelConfig
from trine.engine.model.families.base import HfConfig
from trine.engine.model.families.settings import read_decoder, require, write_decoder
from trine.engine.model.head_config import HeadActivation, HeadConfig, Problem, Task, TransformConfig

_PROBLEMS: dict[str, Problem] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
# Far beyond what a classifier has; more is a damaged file.
_MOST_LABELS = 2**20
# What encoders of the BERT kind have in common; their norms follow the sums.
BERT_SWITCHES: Mapping[str, Any] = {
    "causal": False, "norm": "layer", "placement": "post_sum", "final_norm": False, "embedding_norm": True,
    "positions": "learned", "rope": None, "qkv_bias": True, "o_bias": True, "mlp": "plain", "mlp_bias": True,
}  # fmt: skip
# Class defaults of transformers 5.23 `BertConfig`, which its relatives repeat.
BERT_DEFAULTS: HfConfig = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
BERT_NEUTRAL: HfConfig = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "tie_word_embeddings": True,
}
BERT_LAYER: Mapping[str, str] = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "post_attention_layernorm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "post_feedforward_layernorm",
}


def read_bert(hf: HfConfig, family: str, head: HeadConfig, **switches: Any) -> ModelConfig:
    """The `ModelConfig` of an encoder with BERT's keys; `switches` are what differs."""
    width, num_heads = require(hf, "hidden_size"), require(hf, "num_attention_heads")
    if width % num_heads:
        raise CheckpointError(
            f"config.json has hidden_size {width}, which is not a multiple of num_attention_heads {num_heads}"
        )
    dropout = DropoutConfig(
        embedding=float(hf["hidden_dropout_prob"] or 0.0),
        attention=float(hf["attention_probs_dropout_prob"] or 0.0),
        residual=float(hf["hidden_dropout_prob"] or 0.0),
    )
    named = {"num_key_value_heads": None, "head_dim": None}
    values = {**BERT_SWITCHES, "token_types": require(hf, "type_vocab_size"), "dropout": dropout, **switches}
    return read_decoder({**hf, **named}, family, eps="layer_norm_eps", head=head, head_bias=True, **values)


def write_bert(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_bert` reads."""
    hf = write_decoder(config, eps="layer_norm_eps")
    for key in ("num_key_value_heads", "head_dim", "attention_dropout"):
        del hf[key]
    if config.activation == "gelu_tanh":
        hf["hidden_act"] = "gelu_new"
    return {
        **hf,
        **write_head(config),
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout.residual,
        "attention_probs_dropout_prob": config.dropout.attention,
        "classifier_dropout": None if config.head is None else config.head.dropout,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    }


def read_head(
    hf: HfConfig,
    tasks: Mapping[Task, str],
    *,
    vocabulary: TransformConfig,
    classes: TransformConfig | None = None,
    pooler: tuple[Task, ...] = (),
    pooler_activation: HeadActivation = "tanh",
    pooling: Any = "cls",
) -> HeadConfig:
    """The head of the class that config.json names, by default one for masked language modelling.

    `tasks`: names of classes. `vocabulary`: the layer before logits over the vocabulary, `classes`: the one before
    labels. `pooler`: which tasks have one. `pooling`: of classification.
    """
    task = read_task(hf, tasks)
    pooled: dict[str, Any] = {"pooler": True, "pooler_activation": pooler_activation} if task in pooler else {}
    if task in ("masked_lm", "pretraining"):
        return HeadConfig(task=task, transform=vocabulary, **pooled)
    if task == "features":
        return HeadConfig(task=task, **pooled)
    labels, dropout = read_labels(hf), read_dropout(hf)
    if task == "tagging":
        return HeadConfig(task=task, labels=labels, transform=classes, dropout=dropout, **pooled)
    if pooling not in ("cls", "mean"):
        raise CheckpointError(f"config.json has classifier_pooling {pooling!r}; supported: cls, mean")
    name = hf.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    if name not in _PROBLEMS:
        raise CheckpointError(f"config.json has problem_type {name!r}; supported: {', '.join(_PROBLEMS)}")
    return HeadConfig(
        task=task, labels=labels, problem=_PROBLEMS[name], transform=classes, pooling=pooling,
        score_activation=read_score_activation(hf), dropout=dropout, **pooled,
    )  # fmt: skip


def read_task(hf: HfConfig, tasks: Mapping[Task, str]) -> Task:
    """The task of the class in `architectures`; a config without one is that of a new model for masked LM."""
    names = hf.get("architectures") or [tasks["masked_lm"]]
    for task, name in tasks.items():
        if names == [name]:
            return task
    raise CheckpointError(f"config.json has architectures {names!r}; supported: {', '.join(tasks.values())}")


def read_labels(hf: HfConfig) -> tuple[str, ...]:
    """The names of the classes: of `id2label`, else LABEL_0, ... for `num_labels`, which is 2 where nothing is said."""
    names = hf.get("id2label")
    if names is None:
        count = hf.get("num_labels") or 2
        if not isinstance(count, int) or not 0 < count <= _MOST_LABELS:
            raise CheckpointError(f"config.json has num_labels {count!r}; it must be from 1 to {_MOST_LABELS}")
        return tuple(f"LABEL_{label}" for label in range(count))
    if not isinstance(names, Mapping) or not names:
        raise CheckpointError(f"config.json has id2label {names!r}; expected a name for each of 0, 1, 2, ...")
    by_number = {int(number): str(label) for number, label in names.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise CheckpointError(f"config.json has id2label for {sorted(by_number)}; expected 0, 1, 2, ...")
    return tuple(by_number[number] for number in range(len(by_number)))


def read_dropout(hf: HfConfig) -> float:
    """Dropout before the classes."""
    own = hf.get("classifier_dropout")
    return float((hf.get("hidden_dropout_prob") if own is None else own) or 0.0)


def read_score_activation(hf: HfConfig) -> str | None:
    """The class that sentence-transformers notes for a cross-encoder, now or before its version 4."""
    inside = hf.get("sentence_transformers")
    name = (inside.get("activation_fn") if isinstance(inside, Mapping) else None) or hf.get(
        "sbert_ce_default_activation_function"
    )
    return None if name is None else str(name)


def write_head(config: ModelConfig) -> dict[str, Any]:
    """The labels and the problem of the task; `architectures` is written with the family."""
    head = config.head
    if head is None:
        return {}
    score = head.score_activation
    scored = {} if score is None else {"sentence_transformers": {"activation_fn": score}}
    return {**labels_to_hf(head.labels, head.problem), **scored}


def labels_to_hf(labels: tuple[str, ...], problem: Problem | None) -> dict[str, Any]:
    """What config.json says of classes."""
    hf: dict[str, Any] = {}
    if labels:
        hf["id2label"] = {str(number): label for number, label in enumerate(labels)}
        hf["label2id"] = {label: number for number, label in enumerate(labels)}
    if problem is not None:
        hf["problem_type"] = next(name for name, ours in _PROBLEMS.items() if ours == problem)
    return hf
