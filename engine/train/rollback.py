"""Rollback: after a loss spike or a gradient that is not finite, back to the last checkpoint and past the data since.

The samples from the checkpoint to the step that failed are left out for good, which the state of the run records. A run
that is killed after that and before its next checkpoint meets the same failure at the same step again and goes back the
same way: nothing but the checkpoint decides it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trine.engine.errors import LossSpikeError, NonFiniteError
from trine.engine.train.ema import Ema
from trine.engine.train.optim import Optimizer
from trine.engine.train.run_folder import RunFolder
from trine.engine.train.step_folder import TrainerState, load_ema, load_optimizer, read_state
from trine.engine.train.subject import Subject, restore_weights

Divergence = NonFiniteError | LossSpikeError


@dataclass
class Rollbacks:
    """Goes back to a run's newest complete checkpoint, to each at most `limit` times."""

    folder: RunFolder
    limit: int
    _count: dict[int, int] = field(default_factory=dict)

    def find(self, error: Divergence) -> tuple[Path, TrainerState]:
        """The checkpoint to go back to, and its state; raises `error`, with the reason, where there is none."""
        target = self.folder.latest()
        if target is None:
            raise type(error)(f"{error}; there is no checkpoint to go back to")
        state = read_state(target)
        count = self._count.get(state.step, 0)
        if count == self.limit:
            raise type(error)(
                f"{error}; went back to {target.name} {count} times already (spike.max_rollbacks), and other data "
                "did not help"
            )
        self._count[state.step] = count + 1
        return target, state


def restore(subject: Subject, optimizer: Optimizer, ema: Ema | None, folder: Path, state: TrainerState) -> None:
    """Weights, their average and optimizer state as a step folder holds them, in place."""
    restore_weights(subject.trained, folder, subject.model)
    subject.trained.zero_grad(set_to_none=True)
    load_optimizer(optimizer, folder, updates=state.optimizer_updates)
    load_ema(ema, folder, updates=state.ema_updates)
