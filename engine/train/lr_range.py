"""`--lr-range MIN:MAX`: a short training with a rising learning rate, to see where the loss falls and where it rises.

The rate grows from step to step by the same factor, from MIN to MAX (range test: Smith, arXiv 1506.01186). The loss is
smoothed by the mean of a window around each step. The test ends early where the loss is twice its lowest value, or a
loss or gradient is not finite. Suggested is a tenth of the rate at which the smoothed loss was lowest: there it still
fell, with room to the rate from which it rises. With Muon its rate rises in proportion.

Nothing of the run is written: beside where its folder would be, `RUN.lr-range.json` (curve, suggestion) and
`RUN.lr-range.svg` (the curve drawn).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trine.engine.env import environment
from trine.engine.errors import NonFiniteError, StorageError, UsageError
from trine.engine.log import progress, say
from trine.engine.train import out_of_memory
from trine.engine.train import step as steps
from trine.engine.train.charts import Line, draw, smooth, standalone
from trine.engine.train.durable import write_file
from trine.engine.train.optim import Optimizer
from trine.engine.train.recipe import Recipe, recipe_table
from trine.engine.train.resolve import Setup, resolve
from trine.engine.train.subject import make_subject

DEFAULT_STEPS = 100
LEAST_STEPS = 20
BLOWN_UP = 2.0  # times the lowest smoothed loss
BELOW_LOWEST = 10.0  # the suggestion is the rate of the lowest loss over this
_SETTLED = 5  # the first losses tell more of the batch than of the rate


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step: its rate, the loss before its update, and the smoothed loss."""

    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A learning rate, or None where the curve does not show one, and why."""

    lr: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class LrRange:
    """What `--lr-range MIN:MAX[:STEPS]` asks for."""

    low: float
    high: float
    steps: int = DEFAULT_STEPS

    def rate(self, step: int) -> float:
        """The rate of step `step`, from 0."""
        return float(self.low * (self.high / self.low) ** (step / (self.steps - 1)))


def parse_range(text: str) -> LrRange:
    """Raises `UsageError` where `text` is not MIN:MAX or MIN:MAX:STEPS with 0 < MIN < MAX and at least 20 steps."""
    number = r"([0-9.]+(?:[eE][-+]?[0-9]+)?)"
    found = re.fullmatch(rf"{number}:{number}(?::([0-9]+))?", text)
    try:
        low, high, count = (
            (float(found[1]), float(found[2]), int(found[3] or DEFAULT_STEPS)) if found else (0.0, 0.0, 0)
        )
    except ValueError:
        low, high, count = 0.0, 0.0, 0
    if not 0 < low < high < math.inf or count < LEAST_STEPS:
        raise UsageError(
            f"--lr-range {text!r} should be MIN:MAX or MIN:MAX:STEPS with 0 < MIN < MAX and {LEAST_STEPS} steps or "
            "more, such as 1e-6:1"
        )
    return LrRange(low=low, high=high, steps=count)


def lr_range_test(recipe: Recipe, wanted: LrRange) -> Path:
    """Run the test, say what it suggests, and return the path of the curve.

    Raises what `resolve` raises, and `StorageError` where the result cannot be written.
    """
    setup = resolve(recipe)
    random_devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices=random_devices):
        measured, ended = _ramp(setup, wanted)
    smoothed = smooth([loss for _, loss in measured])
    curve = [Point(lr=lr, loss=loss, smoothed=mean) for (lr, loss), mean in zip(measured, smoothed, strict=True)]
    found = suggest(curve, ended)
    say(f"{f'optim.lr = {found.lr:.2g}' if found.lr is not None else 'no suggestion'}: {found.reason}")
    run = setup.recipe.run.dir
    path = run.with_name(f"{run.name}.lr-range.json")
    result: dict[str, Any] = {
        "suggestion": asdict(found),
        "range": asdict(wanted),
        "ended": ended,
        "curve": [asdict(point) for point in curve],
        "recipe": recipe_table(setup.recipe),
        "environment": environment(setup.device),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(result, indent=1) + "\n")
        write_file(path.with_suffix(".svg"), _figure(curve, found))
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error.strerror}); give another run.dir") from None
    return path


def suggest(curve: list[Point], ended: str) -> Suggestion:
    """See the module's docstring; `ended` says what the loss did where the test ended before MAX, or is empty."""
    settled = curve[_SETTLED:]
    if not settled:
        return Suggestion(lr=None, reason=f"the loss {ended} within the first {_SETTLED} steps; lower MIN")
    lowest = min(settled, key=lambda point: point.smoothed)
    if lowest is settled[0]:
        return Suggestion(lr=None, reason=f"the loss rose from the first rates on; lower MIN (now {curve[0].lr:.2g})")
    fallen = settled[0].smoothed - lowest.smoothed
    if fallen < 0.01 * settled[0].smoothed:
        return Suggestion(lr=None, reason="the loss fell by less than 1 %; raise MAX, or give more steps")
    if lowest is settled[-1] and not ended:
        reason = f"the loss still fell at MAX = {lowest.lr:.2g}, so nothing tells where it rises; raise MAX"
        return Suggestion(lr=None, reason=reason)
    lr = lowest.lr / BELOW_LOWEST
    reason = (
        f"the smoothed loss was lowest ({lowest.smoothed:.3f}, from {settled[0].smoothed:.3f}) at {lowest.lr:.2g}, and "
        f"{ended or 'rose from there to MAX'}; a tenth of that"
    )
    if lr < curve[0].lr:
        return Suggestion(lr=None, reason=f"{reason} lies below MIN = {curve[0].lr:.2g}; lower MIN")
    return Suggestion(lr=lr, reason=reason)


def _ramp(setup: Setup, wanted: LrRange) -> tuple[list[tuple[float, float]], str]:
    """Rates with their losses, and what the loss did where it ended before MAX ("" where it did not)."""
    recipe = setup.recipe
    subject = make_subject(setup)
    subject.model.train()
    optimizer = Optimizer(subject.trained, recipe.optim, muon_dtype=setup.compute_dtype, seed=recipe.train.seed)
    curve: list[tuple[float, float]] = []
    for step in progress(range(wanted.steps), total=wanted.steps, what="learning rates"):
        pieces = steps.micro_batches(
            setup.stream,
            first_sample=step * recipe.train.batch_size,
            batch_size=recipe.train.batch_size,
            micro_batch_size=setup.micro_batch_size,
        )
        rate = wanted.rate(step)
        try:
            loss = subject.gradients(setup, pieces, num_valid=steps.count_valid(pieces))
        except (MemoryError, RuntimeError) as error:
            if out_of_memory.found_in(error):
                raise out_of_memory.in_a_step(error, setup, step=step + 1) from None
            raise
        try:
            result = steps.check_and_clip(subject.trained, loss, max_norm=recipe.optim.grad_clip, step=step + 1)
        except NonFiniteError as error:
            return curve, f"stopped being finite at {rate:.2g} ({error})"
        curve.append((rate, result.loss))
        if result.loss > BLOWN_UP * min(loss for _, loss in curve):
            return curve, f"blew up at {rate:.2g}"
        optimizer.step(rate / recipe.optim.lr)
        subject.trained.zero_grad(set_to_none=True)
    return curve, ""


def _figure(curve: list[Point], found: Suggestion) -> str:
    rates = [point.lr for point in curve]
    lines = [
        Line(label="loss", xs=rates, ys=[point.loss for point in curve], role="raw", width=1.0),
        Line(label="smoothed", xs=rates, ys=[point.smoothed for point in curve], role="loss", width=2.0),
    ]
    legend = "loss by learning rate" + (f"; suggested {found.lr:.2g}" if found.lr is not None else "")
    marks = [] if found.lr is None else [found.lr]
    chart = draw(
        lines, name="lr-range", size=(760, 300), x_range=(rates[0], rates[-1]), log_x=True, marks=marks, legend=legend
    )
    return standalone(chart)
