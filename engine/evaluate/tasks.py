"""Tasks of lm-evaluation-harness on one model: what is asked, what comes of it, and how it is shown.

This module imports `lm_eval`: import it only where tasks are run.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from trine.engine.env import package_version
from trine.engine.errors import TrineError, UsageError
from trine.engine.evaluate.harness import TrineLM
from trine.engine.evaluate.task_data import LocalData, Splits
from trine.engine.evaluate.task_settings import TaskSettings

# Draws of the bootstrap by which the harness finds the standard error of what is no mean.
_BOOTSTRAP = 1000
# The harness's own: of what tasks draw, and of which examples stand before a question.
_SEED, _NUMPY_SEED = 0, 1234
# What of the harness's result is kept; the rest says what the settings say already.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


class Tasks:
    """Tasks with their data, ready to be put to models. Raises what `load` of them raises: see `TaskSettings`."""

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        self._data = LocalData(settings.data)
        with _silence():
            self._manager = TaskManager(include_path=str(settings.data))
        for name in settings.tasks:
            self._check(name)

    def run(self, lm: TrineLM, *, samples: bool = False) -> dict[str, Any]:
        """Put all of them to a model: scores by task, of groups too, with what they were measured on.

        `samples`: with every example, what was asked and what was answered. Raises `DataError` naming the split that is
        missing, and whatever the model raises.
        """
        random.seed(_SEED)
        np.random.seed(_NUMPY_SEED)
        with _silence():
            built: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name in self.settings.tasks:
                for kind, members in self._build(name).items():
                    built[kind].update(members)
            for task in built["tasks"].values():
                self._set_up(task)
            found = evaluate(
                lm=lm,
                task_dict=built,
                limit=self.settings.limit,
                apply_chat_template=self.settings.chat,
                fewshot_as_multiturn=self.settings.chat,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=samples,
            )
        kept = {name: found[name] for name in _KEPT if name in found}
        record = {**kept, "data": dict(sorted(self._data.read.items())), "lm_eval": package_version("lm_eval")}
        return {**record, "samples": found["samples"]} if samples else record

    def _set_up(self, task: Any) -> None:
        """As the harness's own command does it; a task that says 0 examples means that."""
        settings = self.settings
        if settings.max_gen_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": settings.max_gen_tokens}, update=True)
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and settings.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        task.set_fewshot_seed(seed=_NUMPY_SEED)

    def _build(self, name: str) -> dict[str, dict[str, Any]]:
        """The task, or the tasks of a group, by this name; made anew, since the harness keeps answers in them."""
        single = name in self._manager.all_subtasks
        with self._data.for_task(name, single=single):
            try:
                loaded = self._manager.load([name])
            except TrineError:
                raise
            except Exception as error:  # a task is code of its own, and can raise anything
                if self._data.last is not None:
                    # What a task is scored on is asked for after the examples to show, which it can do without.
                    for split in sorted(self._data.last.missing, key=lambda split: (split.startswith("train"), split)):
                        self._data.last.require(split)
                reason = f"{type(error).__name__}: {error}"
                raise UsageError(f"task {name!r} cannot be built: {' '.join(reason.split())}") from error
        for task in loaded["tasks"].values():
            self._check_splits(task)
        return dict(loaded)

    def _check_splits(self, task: Any) -> None:
        """The questions of a task are there, and the examples before them where there are to be any."""
        splits, config = task.dataset, task.config
        if not isinstance(splits, Splits):
            return
        evaluated = config.test_split or config.validation_split
        if evaluated is not None:
            splits.require(evaluated)
        shots = self.settings.num_fewshot if config.num_fewshot != 0 else 0
        if shots or (shots is None and config.num_fewshot):
            for split in sorted(splits.missing):
                splits.require(split)

    def _check(self, name: str) -> None:
        if name in self._manager.all_tasks:
            return
        near = difflib.get_close_matches(name, self._manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see lm-evaluation-harness's list of tasks"
        raise UsageError(f"there is no task {name!r} in lm_eval {package_version('lm_eval')} nor as .yaml file; {hint}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The harness prints what it does; stdout is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
