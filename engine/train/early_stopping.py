"""Early stopping: a run ends once the validation loss has not fallen for `eval.patience` evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from trine.engine.train.recipe import EvalSettings


@dataclass
class EarlyStopping:
    """The lowest validation loss so far, its step, and how many evaluations came after it. Part of a checkpoint."""

    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0

    def take(self, loss: float, *, step: int, settings: EvalSettings) -> None:
        """An evaluation. Only a loss lower by more than `min_improvement` counts as lower; NaN never does."""
        if self.best_loss is None or loss < self.best_loss - settings.min_improvement:
            self.best_loss, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    def due(self, settings: EvalSettings) -> bool:
        """Whether it is time to stop; never with a patience of 0."""
        return settings.patience > 0 and self.waited >= settings.patience
