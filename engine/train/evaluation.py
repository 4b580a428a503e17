"""Evaluations of a run: every set, with the weights as they are and, where there is one, with their average.

The data's own validation split is the set `validation`; `eval.sets` names more. One loss decides: that of the set
`eval.main` with the weights that are exported (`export.weights`). Early stopping and `checkpoint.keep_best` go by it.
Several ranks all evaluate everything, and decide by the loss that rank 0 has found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from trine.engine.log import format_duration
from trine.engine.train.early_stopping import EarlyStopping
from trine.engine.train.ema import Ema
from trine.engine.train.meters import Meter
from trine.engine.train.metrics import SCORES, MetricsFile
from trine.engine.train.progress import Progress
from trine.engine.train.ranks import Ranks
from trine.engine.train.recipe import OWN_SET, Recipe
from trine.engine.train.resolve import Setup
from trine.engine.train.subject import Subject, make_scorer
from trine.engine.train.task_data import sample_prompt
from trine.engine.train.validation import ValidationResult, sample, validate


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one set with one kind of weights, `raw` or `ema`."""

    name: str
    weights: str
    result: ValidationResult
    seconds: float


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates a run when it is time to; `last` is what decided at the last evaluation, made at step `step`."""

    setup: Setup
    subject: Subject
    ema: Ema | None
    ranks: Ranks = field(default_factory=Ranks)
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    last: ValidationResult | None = None
    step: int = -1

    def due(self, step: int) -> bool:
        """Whether this step is evaluated."""
        recipe = self.setup.recipe
        return bool(self.setup.evaluation_sets) and (step % recipe.eval.every == 0 or step == recipe.train.steps)

    def finished(self) -> bool:
        """Whether it is time to stop early."""
        return self.stopping.due(self.setup.recipe.eval)

    def loss_of(self, step: int) -> float | None:
        """The loss that decides, where this very step was evaluated."""
        return self.last.loss if self.last is not None and self.step == step else None

    @property
    def judge(self) -> str:
        """What decides, in words: the set, and the weights where they are not the trained ones as they are."""
        return judge_of(self.setup.recipe)

    def why_finished(self) -> str:
        """Why it is time to stop early."""
        found, shown = self.stopping, "" if self.judge == OWN_SET else f" ({self.judge})"
        return (
            f"stopped early: the validation loss{shown} has not fallen for {found.waited} evaluations since step "
            f"{found.best_step} ({found.best_loss:.4f})"
        )

    def take(self, stopping: tuple[float | None, int | None, int], judge: str) -> str | None:
        """Go on from a checkpoint; returns what is to be said where another loss decided then."""
        self.stopping = EarlyStopping(*stopping)
        if judge == self.judge or self.stopping.best_step is None:
            return None
        self.stopping = EarlyStopping()
        return f"what decides was {judge}, is {self.judge}: patience and keep_best begin anew"

    def run(self, metrics: MetricsFile, progress: Progress, meter: Meter, *, step: int) -> None:
        """Evaluate every set with every kind of weights, log and say it; draw the samples with those exported."""
        recipe = self.setup.recipe
        done: dict[str, list[Evaluation]] = {}
        for entry in self._evaluate(meter):
            done.setdefault(entry.name, []).append(entry)
            metrics.write(
                "eval",
                step,
                set=entry.name,
                weights=entry.weights,
                loss=entry.result.loss,
                bits_per_byte=entry.result.bits_per_byte,
                **entry.result.scores,
                tokens=entry.result.tokens,
                seconds=entry.seconds,
            )
            if (entry.name, entry.weights) == (recipe.eval.main, recipe.export.weights):
                loss = self.ranks.gather([entry.result.loss])[0][0]
                self.last, self.step = replace(entry.result, loss=loss), step
                self.stopping.take(loss, step=step, settings=recipe.eval)
        for name, entries in done.items():
            progress.message(f"step {step}: {described(name, entries)}")
        for prompt, text in zip(recipe.eval.sample_prompts, self._samples(), strict=True):
            metrics.write("sample", step, prompt=prompt, text=text)
            goes_on = recipe.objective.kind == "causal_lm"
            shown = repr(prompt + text) if goes_on else f"{prompt!r} -> {text!r}"
            progress.message(f"  {shown}")
        meter.end_pause()

    def weights(self, kind: str) -> AbstractContextManager[None]:
        """The model with its `raw` weights or their average, `ema`."""
        return nullcontext() if kind == "raw" or self.ema is None else self.ema.applied()

    def _evaluate(self, meter: Meter) -> Iterator[Evaluation]:
        batch_size = self.setup.recipe.eval.batch_size or self.setup.micro_batch_size
        meter.end_pause()
        for name, data in self.setup.evaluation_sets.items():
            for kind in ("raw",) if self.ema is None else ("raw", "ema"):
                with self.weights(kind), self.subject.computing():
                    result = validate(
                        self.subject.model,
                        make_scorer(self.setup, self.subject.objective),
                        data,
                        batch_size=batch_size,
                        compute_dtype=self.setup.compute_dtype,
                    )
                yield Evaluation(name=name, weights=kind, result=result, seconds=meter.end_pause())

    def _samples(self) -> list[str]:
        recipe = self.setup.recipe
        with self.weights(recipe.export.weights), self.subject.computing():
            return sample(
                self.subject.model,
                self.setup.tokenizer,
                [sample_prompt(recipe, self.setup.tokenizer, prompt) for prompt in recipe.eval.sample_prompts],
                recipe.eval,
                seed=recipe.train.seed,
                compute_dtype=self.setup.compute_dtype,
            )


def judge_of(recipe: Recipe) -> str:
    """See `Evaluator.judge`."""
    average = ", averaged weights" if recipe.export.weights == "ema" else ""
    return f"{recipe.eval.main or 'nothing'}{average}"


def who_decides(recipe: Recipe) -> str | None:
    """A line that names the loss by which a run decides, where it decides anything."""
    by_it = {"early stopping": recipe.eval.patience, "checkpoint.keep_best": recipe.checkpoint.keep_best}
    used = [name for name, count in by_it.items() if count]
    return f"{' and '.join(used)} by the loss of: {judge_of(recipe)}" if used else None


def _shown(score: float) -> str:
    return f"{score:.4f}" if math.isfinite(score) else "undefined (all predictions, or all targets, are equal)"


def described(name: str, entries: list[Evaluation]) -> str:
    """`validation loss 2.3456, 1.2345 bits per byte; averaged weights 2.3333, ... (1.2 s)`."""
    parts = []
    for entry in entries:
        bits = entry.result.bits_per_byte
        shown = f"{entry.result.loss:.4f}" + ("" if bits is None else f", {bits:.4f} bits per byte")
        shown += "".join(f", {SCORES[key]} {_shown(value)}" for key, value in entry.result.scores.items())
        parts.append(f"averaged weights {shown}" if entry.weights == "ema" else f"{name} loss {shown}")
    return f"{'; '.join(parts)} ({format_duration(sum(entry.seconds for entry in entries))})"
