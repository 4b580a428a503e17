"""Which tasks of lm-evaluation-harness, and how they are put to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trine.engine.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """How tasks are run.

    Attributes:
        tasks: names of tasks, groups of them, or tags.
        data: the folder of their data; .yaml files in it are tasks too.
        num_fewshot: examples before each question; None as the task says.
        limit: so many examples of each task, the first ones; None for all.
        chat: put questions as a conversation through the model's chat template.
        max_gen_tokens: new tokens of a generated answer at most; None as the task says.
    """

    tasks: tuple[str, ...]
    data: Path
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    max_gen_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_fewshot", 0), ("limit", 1), ("max_gen_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, got {value}")
