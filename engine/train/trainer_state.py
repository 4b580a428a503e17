"""What a checkpoint keeps of a run in progress besides its tensors, and taking it up again."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING

from trine.engine.train.meters import SmoothedLoss
from trine.engine.train.spikes import LossWatch
from trine.engine.train.step_folder import TrainerState

if TYPE_CHECKING:
    from trine.engine.train.loop import Trainer


def state_of(trainer: Trainer) -> TrainerState:
    """As of the last step."""
    trainer.energy.update()
    stream = trainer.setup.stream
    return TrainerState(
        step=trainer.step,
        next_sample=trainer.next_sample,
        tokens=trainer.meter.tokens,
        seconds=trainer.meter.seconds,
        smoothed_loss=(trainer.smoothed.total, trainer.smoothed.weight),
        validation_loss=trainer.evaluator.loss_of(trainer.step),
        judge=trainer.evaluator.judge,
        early_stopping=astuple(trainer.evaluator.stopping),
        ema_updates=0 if trainer.ema is None else trainer.ema.updates,
        energy=trainer.energy.state,
        optimizer_updates=trainer.optimizer.updates,
        recent_losses=list(trainer.watch.recent),
        skipped=trainer.skipped,
        data_fingerprint=stream.fingerprint,
        data_stamps=stream.stamps(),
        tokenizer_fingerprint=trainer.setup.tokenizer.fingerprint,
        environment=trainer.facts,
    )


def take(trainer: Trainer, state: TrainerState) -> None:
    """Counters and meters as a checkpoint holds them."""
    trainer.step, trainer.next_sample = state.step, state.next_sample
    trainer.skipped = list(state.skipped)
    trainer.meter.seconds, trainer.meter.tokens = state.seconds, state.tokens
    trainer.smoothed = SmoothedLoss(*state.smoothed_loss)
    if changed := trainer.evaluator.take(state.early_stopping, state.judge):
        trainer.tell(changed)
    trainer.watch = LossWatch(trainer.setup.recipe.spike, state.recent_losses)
