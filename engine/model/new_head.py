"""A checkpoint with another head: what fine-tuning begins with.

The encoder is read as it is, and of the head what the checkpoint has of the same meaning (a pooler, the same labels);
the rest gets first weights. What is new is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trine.engine.errors import UsageError
from trine.engine.log import say
from trine.engine.model.checkpoint import open_checkpoint, read_config, read_hf_config
from trine.engine.model.families.encoder import labels_to_hf
from trine.engine.model.families.registry import family_for
from trine.engine.model.head_config import Problem, Task
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import some_names


def load_for_task(
    folder: Path | str,
    task: Task,
    *,
    labels: tuple[str, ...] = (),
    problem: Problem | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The encoder of a checkpoint with a head for `task`, in evaluation mode.

    `labels`: names of the classes (of a regression: of its numbers), for classification and tagging. `problem`: of
    classification, by default one class of several. Raises `UsageError` for a task that the family does not have,
    `CheckpointError` for a folder that cannot be read.
    """
    settings = head_settings(folder, task, labels=labels, problem=problem)
    own = read_config(folder).head
    same_labels = own is not None and (own.task, own.labels) == (task, labels)
    with open_checkpoint(folder, head_settings=settings) as opened:
        model = opened.model.to(dtype).to_empty(device=device)
        initialize(model, seed)
        parameters = dict(model.named_parameters())
        # Classes of another meaning are not those asked for, however many they are.
        rules = [rule for rule in opened.rules if same_labels or not rule.ours[0].startswith("head.classifier.")]
        with torch.no_grad():
            for rule in rules:
                parts = [rule.part(parameters[name]) for name in rule.ours]
                for part, numbers in zip(parts, opened.read(rule, dtype), strict=True):
                    part.copy_(numbers)
        new = sorted(parameters.keys() - {name for rule in rules for name in rule.ours})
    if new:
        say(f"{len(new)} tensors of the head for {task} are new: {some_names(new)}")
    return model.eval()


def head_settings(
    folder: Path | str, task: Task, *, labels: tuple[str, ...] = (), problem: Problem | None = None
) -> dict[str, Any]:
    """What config.json says of a head for `task`: the class of transformers and its labels."""
    family = family_for(read_hf_config(folder))
    if task not in family.tasks:
        known = f"it has {', '.join(family.tasks)}" if family.tasks else "it is no encoder"
        raise UsageError(f"a {family.name} model has no head for {task}; {known}")
    if task == "classification":
        problem = problem or ("regression" if len(labels) == 1 else "single_label")
    if bool(labels) != (task in ("classification", "tagging")):
        raise UsageError(f"a head for {task} with labels {labels}; classification and tagging need them, others do not")
    return {"architectures": [family.tasks[task]], **labels_to_hf(labels, problem)}
