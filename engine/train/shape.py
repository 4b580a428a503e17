"""Whether an objective fits a model, and the head that a model needs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trine.engine.errors import UsageError
from trine.engine.model.checkpoint import read_hf_config
from trine.engine.model.config import ModelConfig
from trine.engine.model.families.encoder import labels_to_hf
from trine.engine.model.families.registry import FAMILIES, config_from_hf
from trine.engine.model.head_config import Problem, Task
from trine.engine.model.new_head import head_settings
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.recipe_objective import CHATS, PAIRS, ObjectiveSettings

# Names of the shapes, with an objective for each.
_SHAPES = {
    "decoder": ("a decoder (llama, qwen3, gpt2, ...)", "causal_lm"),
    "encoder": ("an encoder (bert, roberta, modernbert, ...)", "masked_lm"),
    "encoder-decoder": ("an encoder-decoder (t5, marian, ...)", "seq2seq"),
}


def wanted_shape(objective: ObjectiveSettings) -> str:
    """The shape of model that an objective is for."""
    if objective.kind == "causal_lm" or objective.kind in CHATS:
        return "decoder"
    return "encoder-decoder" if objective.kind in PAIRS else "encoder"


def wanted_task(objective: ObjectiveSettings) -> Task | None:
    """The task of the head that an encoder needs; None for other shapes."""
    if wanted_shape(objective) != "encoder":
        return None
    if objective.kind == "masked_lm":
        return "pretraining" if objective.value("next_sentence") else "masked_lm"
    return "tagging" if objective.kind == "tagging" else "classification"


def wanted_problem(objective: ObjectiveSettings) -> Problem | None:
    """What a head for classification learns; None for other tasks."""
    problems: dict[str, Problem] = {"classification": "single_label", "regression": "regression"}
    return problems.get(objective.kind)


def check_shape(objective: ObjectiveSettings, family: str | None, *, named: str) -> None:
    """Raises `UsageError` where a family, as `named`, is unknown or of another shape than the objective is for."""
    if family is None or family not in FAMILIES:
        near = get_close_matches(str(family), FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"model.family = {family!r} is not known; known: {', '.join(FAMILIES)}{hint}")
    wanted, found = wanted_shape(objective), FAMILIES[family].shape
    if found != wanted:
        raise UsageError(
            f'objective.kind = "{objective.kind}" is for {_SHAPES[wanted][0]}, and {named} is {_article(found)}; take '
            f'another model, or objective.kind = "{_SHAPES[found][1]}"'
        )
    task = wanted_task(objective)
    if task is not None and task not in FAMILIES[family].tasks:
        remedy = "objective.next_sentence = false" if task == "pretraining" else "another family"
        raise UsageError(f"{named} has no head for {task} in its format; take {remedy}")


def new_settings(
    objective: ObjectiveSettings, family: str, tokenizer: Tokenizer, labels: Sequence[str], dropout: float
) -> dict[str, Any]:
    """Keys of config.json that a new model needs for an objective."""
    task = wanted_task(objective)
    if task is not None:
        head = {
            "architectures": [FAMILIES[family].tasks[task]],
            **labels_to_hf(tuple(labels), wanted_problem(objective)),
        }
        return {**head, "classifier_dropout": dropout, "seq_classif_dropout": dropout}
    if wanted_shape(objective) == "decoder":
        return {}
    ids = {"pad_token": tokenizer.pad_id, "eos_token": tokenizer.eos_id}
    for name, found in ids.items():
        if found is None:
            raise UsageError(
                f"the tokenizer names no {name}, which an encoder-decoder's targets begin or end with; train one with "
                "`trine tokenizer train --roles encoder-decoder`"
            )
    return {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
        "decoder_start_token_id": tokenizer.pad_id,
        "forced_eos_token_id": None,
        "bad_words_ids": None,
    }


def with_head(
    config: ModelConfig, folder: Path, objective: ObjectiveSettings, labels: Sequence[str], dropout: float
) -> ModelConfig:
    """The config of a checkpoint with the head that the objective needs: its own where that fits, else a fresh one."""
    task = wanted_task(objective)
    if task is None:
        return config
    settings = head_settings(folder, task, labels=tuple(labels), problem=wanted_problem(objective))
    head = config_from_hf({**read_hf_config(folder), **settings}).head
    assert head is not None
    return replace(config, head=replace(head, dropout=dropout if head.labels else head.dropout))


def _article(shape: str) -> str:
    return f"{'an' if shape[0] == 'e' else 'a'} {shape}"
