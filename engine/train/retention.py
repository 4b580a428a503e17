"""Which step folders a run keeps.

Kept are the newest `keep_last`, every step that is a multiple of `keep_every`, and the `keep_best` with the lowest
validation loss; only folders that are complete count. What is newer than the step just saved is never touched, and
where that one is not complete nothing is removed at all: so the last good checkpoint always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trine.engine.train.recipe import CheckpointSettings


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """One step folder. `validation_loss` is None where that step was not evaluated."""

    step: int
    complete: bool
    validation_loss: float | None = None


def steps_to_remove(saved: Sequence[SavedStep], settings: CheckpointSettings, *, newest: int) -> list[int]:
    """The steps whose folders go, oldest first, once step `newest` is saved."""
    older = sorted((entry for entry in saved if entry.step <= newest), key=lambda entry: entry.step)
    complete = [entry for entry in older if entry.complete]
    if not complete or complete[-1].step != newest:
        return []
    kept = {entry.step for entry in complete[-settings.keep_last :]}
    if settings.keep_every:
        kept |= {entry.step for entry in complete if entry.step % settings.keep_every == 0}
    if settings.keep_best:
        scored = sorted((entry.validation_loss, -entry.step) for entry in complete if entry.validation_loss is not None)
        kept |= {-step for _, step in scored[: settings.keep_best]}
    return [entry.step for entry in older if entry.step not in kept]
