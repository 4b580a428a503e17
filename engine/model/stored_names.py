"""Which tensors of a file a model of some config is made of: names made alike, what other tasks have left aside."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from trine.engine.log import say
from trine.engine.model.config import ModelConfig
from trine.engine.model.families import Family, TensorRule
from trine.engine.model.families.wrappers import text_tensors
from trine.engine.model.quantized.plan import QuantizedRules
from trine.engine.model.weight_files import StoredTensor, some_names


def normalised(files: Mapping[str, StoredTensor], family: Family, config: ModelConfig) -> dict[str, StoredTensor]:
    """Tensors under the names of a model of this config: with the prefix or without, ignored ones dropped.

    Of a multimodal folder those of the text part. Old endings of names are replaced.
    """
    files = text_tensors(files)
    for old, new in family.renamed:
        files = {name.removesuffix(old) + new if name.endswith(old) else name: one for name, one in files.items()}
    bare = not any(name.startswith(family.prefix) for name in files)
    stored = {
        family.prefix + name if bare and not family.is_of_prefix(name) else name: tensor
        for name, tensor in files.items()
    }
    ignored = re.compile(re.escape(family.prefix) + "(" + "|".join(family.ignored) + ")")
    stored = {name: tensor for name, tensor in stored.items() if not ignored.fullmatch(name)}
    for copy, original in family.copies.items():
        if copy in stored and (original not in stored or torch.equal(stored[copy].read(), stored[original].read())):
            stored[original] = stored.pop(copy)
    if config.head is not None and config.head.task == "features":
        stored = {name.removeprefix(family.prefix): tensor for name, tensor in stored.items()}
    return stored


def is_of_head(rule: TensorRule) -> bool:
    """Whether it is a tensor of the head, which another task does not have."""
    return all(name.startswith(("head.", "lm_head.")) or name == "lm_bias" for name in rule.ours)


def fits(rule: TensorRule, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]) -> bool:
    """Whether the file has the tensor of this rule, in the shape that the model's parameters ask for."""
    found = stored.get(rule.stored)
    return found is not None and found.shape == rule.stored_shape([shapes[name] for name in rule.ours])


def of_the_task(
    stored: dict[str, StoredTensor],
    config: ModelConfig,
    family: Family,
    rules: list[TensorRule],
    quantized: QuantizedRules,
) -> dict[str, StoredTensor]:
    """Without what other tasks have beside the model of this one; what is left out is said."""
    expected = {rule.stored for rule in rules} | {name for one in quantized.values() for name in one.layout()}
    extra = sorted(name for name in stored.keys() - expected if family.is_of_another_task(config, name))
    if extra:
        say(f"{len(extra)} tensors are of other tasks and not read: {some_names(extra)}")
    return {name: tensor for name, tensor in stored.items() if name not in extra}


def with_stored_pooler(config: ModelConfig, family: Family, stored: Collection[str]) -> ModelConfig:
    """Hidden states alone may have been saved without the pooler, which they do not need."""
    head = config.head
    if head is None or head.task != "features" or not head.pooler:
        return config
    lacking = [rule for rule in family.rules(config) if rule.ours[0].startswith("head.pooler.")]
    return replace(config, head=replace(head, pooler=any(rule.stored in stored for rule in lacking)))
