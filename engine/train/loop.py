"""The training loop: recipe -> model -> data -> steps, checkpoints and evaluations -> a finished model.

    for each step:  pieces of the batch -> gradients -> check, clip -> update -> log -> evaluate? -> save?

There is no global state: everything lives in a `Trainer`, and which samples a step sees is computed from the step
folder's `next_sample`. Of several ranks (ranks.py) each runs this loop on its part of the pieces, updates what it owns
(shards.py), and decides by what all of them know; rank 0 speaks and writes.
"""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.engine.env import environment
from trine.engine.errors import LossSpikeError, NonFiniteError
from trine.engine.log import format_duration, say
from trine.engine.train import out_of_memory
from trine.engine.train import step as steps
from trine.engine.train.announce import announce, log_end, log_saved, log_start, log_step, open_metrics
from trine.engine.train.ema import Ema
from trine.engine.train.energy import EnergyMeter
from trine.engine.train.energy_counters import counters_of
from trine.engine.train.evaluation import Evaluator
from trine.engine.train.meters import Meter, SmoothedLoss
from trine.engine.train.metrics import MetricsFile, NoMetrics
from trine.engine.train.mixing import OUT_OF_DATA, tell_ended
from trine.engine.train.model_card import model_card
from trine.engine.train.optim import Optimizer
from trine.engine.train.outcome import RunResult, explain, is_known
from trine.engine.train.plan import plan_lines
from trine.engine.train.profile import StepProfiler
from trine.engine.train.progress import Progress
from trine.engine.train.ranks import Ranks, check_same
from trine.engine.train.recipe import RECIPE, Recipe
from trine.engine.train.resolve import Setup, resolve
from trine.engine.train.resume import check_continuation, same_facts
from trine.engine.train.rollback import Divergence, Rollbacks, restore
from trine.engine.train.run_folder import FINAL, RunFolder
from trine.engine.train.run_log import read_run
from trine.engine.train.saver import Saver
from trine.engine.train.schedule import lr_factor
from trine.engine.train.shards import Shards, Told
from trine.engine.train.signals import StopRequest
from trine.engine.train.spikes import LossWatch
from trine.engine.train.step_folder import Snapshot, TrainerState, load_ema, load_optimizer, read_state
from trine.engine.train.subject import Subject, make_subject
from trine.engine.train.subject_cost import training_flops_per_token
from trine.engine.train.trainer_state import state_of, take
from trine.kernels.hardware import keep_freed_memory, peak_flops


def train(
    recipe: Recipe,
    *,
    resume: str | Path = "auto",
    dry_run: bool = False,
    profile: tuple[int, int] | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Run a recipe to its end, or until it is asked to stop; see the module and `RunFolder.find_origin`.

    `profile` names the first and last step that are recorded (see profile.py). `ranks` are those that this process is
    one of (default: the only one); all call this alike.

    Raises `UsageError`, `DataError`, `CheckpointError` before anything is written if the recipe cannot be run or
    continued, and `NonFiniteError` or `OutOfMemoryError` (last checkpoint kept) where training diverges or has no room.
    """
    folder, ranks = RunFolder(recipe.run.dir), ranks or Ranks()
    origin = folder.find_origin(str(resume))
    setup = resolve(recipe, continue_from=origin, place=ranks.place)
    if origin is None or origin.parent.resolve() != folder.path.resolve():
        folder.check_free(setup.recipe)
    facts = environment(setup.device) | {"ranks": ranks.place.count}
    state = None if origin is None else read_state(origin)
    differences = [] if state is None or origin is None else check_continuation(setup, origin, state, facts)
    if dry_run:
        if ranks.first:
            print(plan_lines(setup), flush=True)
        return RunResult(run_dir=folder.path, step=0, tokens=0, seconds=0.0, reason="dry-run")
    check_same(ranks, same_facts(setup, origin))
    random_devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices=random_devices):
        with out_of_memory.told_before_the_first_step(setup):
            trainer = Trainer.build(setup, folder, origin, state, facts, ranks)
        profiler = StepProfiler(folder.path, profile)
        profiler.check(first=trainer.step + 1, last=recipe.train.steps)
        if ranks.first:
            trainer.profiler = profiler
        return trainer.run(resumed=state is not None, differences=differences)


@dataclass(kw_only=True)
class Trainer:
    """A run in progress. `build` makes one, `run` carries it to its end."""

    setup: Setup
    folder: RunFolder
    subject: Subject
    ranks: Ranks
    shards: Shards
    optimizer: Optimizer
    facts: dict[str, Any]
    meter: Meter
    peak_source: str  # of the meter's peak FLOP/s: "known" or "measured"
    saver: Saver
    watch: LossWatch
    rollbacks: Rollbacks
    ema: Ema | None
    evaluator: Evaluator
    energy: EnergyMeter
    profiler: StepProfiler
    smoothed: SmoothedLoss = field(default_factory=SmoothedLoss)
    step: int = 0
    next_sample: int = 0
    skipped: list[list[int]] = field(default_factory=list)
    first_step: int = 0
    saved_step: int = -1
    origin: Path | None = None  # the step folder this run continues
    loss: float | None = None
    tell: Callable[[str], None] = say  # a line that stays on the screen

    @classmethod
    def build(
        cls,
        setup: Setup,
        folder: RunFolder,
        origin: Path | None,
        state: TrainerState | None,
        facts: dict[str, Any],
        ranks: Ranks | None = None,
    ) -> Trainer:
        """Model, optimizer and counters, new or as a step folder left them."""
        ranks = ranks or Ranks()
        if setup.device.type == "cpu":
            keep_freed_memory()
        subject = make_subject(setup)
        shards = Shards(subject.trained, ranks)
        shards.spread()  # machines of other kinds may have drawn other numbers
        # Each rank rounds 8-bit states by random numbers of its own.
        optimizer = Optimizer(
            subject.trained, setup.recipe.optim, muon_dtype=setup.compute_dtype,
            seed=setup.recipe.train.seed + ranks.place.rank, owned=shards.owned,
        )  # fmt: skip
        # What is shown needs no more than rank 0 to measure it.
        peak, peak_source = peak_flops(setup.device, setup.compute_dtype) if ranks.first else (1.0, "")
        per_token = training_flops_per_token(setup) if ranks.first else 0
        settings = setup.recipe.checkpoint
        saver = Saver(
            lambda snapshot: folder.save_step(snapshot, setup.tokenizer, settings), background=settings.background
        )
        spike = setup.recipe.spike
        ema = Ema(subject.trained, setup.recipe.ema, shards) if setup.recipe.ema.decay else None
        trainer = cls(
            ema=ema, evaluator=Evaluator(setup=setup, subject=subject, ema=ema, ranks=ranks), ranks=ranks,
            shards=shards, energy=EnergyMeter(counters_of(setup)), profiler=StepProfiler(folder.path, None),
            watch=LossWatch(spike), rollbacks=Rollbacks(folder, spike.max_rollbacks),
            setup=setup, folder=folder, subject=subject, optimizer=optimizer, facts=facts,
            meter=Meter(flops_per_token=per_token, peak_flops=peak * ranks.place.count), peak_source=peak_source,
            saver=saver,
        )  # fmt: skip
        if origin is not None and state is not None:
            load_optimizer(optimizer, origin, updates=state.optimizer_updates)
            load_ema(ema, origin, updates=state.ema_updates)
            trainer.energy.load_state(state.energy)
            take(trainer, state)
            trainer.first_step = state.step
            if origin.parent.resolve() == folder.path.resolve():
                trainer.saved_step = state.step
            trainer.origin = origin
        return trainer

    def run(self, *, resumed: bool, differences: list[str]) -> RunResult:
        """All remaining steps. Returns after the last one, or after a stop signal, with everything saved."""
        recipe = self.setup.recipe
        metrics: MetricsFile = NoMetrics()
        if self.ranks.first:
            self.folder.begin(recipe, self.origin)
            metrics = open_metrics(self.folder, recipe, after=self.step if resumed else None)
        self.subject.model.train()
        # Garbage is collected only at evaluations and checkpoints, since steps leave no cycles (with activation
        # checkpointing a few functions, but no tensors), and only among what is made from here on: the 200,000 objects
        # that there are already would take 0.25 s each time.
        collecting, frozen = gc.isenabled(), gc.get_freeze_count()
        gc.disable()
        gc.freeze()
        try:
            if resumed:
                metrics.write("resume", self.step, time=time.time(), differences=differences)
            else:
                log_start(metrics, self.setup, self.meter, peak_source=self.peak_source, facts=self.facts)
            announce(self.setup, self.meter, peak_source=self.peak_source)
            with StopRequest() as stop, Progress() as progress:
                self.tell = progress.message
                self.meter.start()
                self.energy.start()
                while not self._complete():
                    self.profiler.begin(self.step + 1)
                    share = steps.deal(
                        self.setup.stream, self.ranks, first_sample=self.next_sample,
                        batch_size=recipe.train.batch_size, micro_batch_size=self.setup.micro_batch_size,
                        asked_to_stop=stop.requested,
                    )  # fmt: skip
                    if share.stop:
                        break
                    try:
                        self._one_step(metrics, progress, share)
                        self.profiler.end(self.step, tell=self.tell)
                    except (NonFiniteError, LossSpikeError) as error:
                        if recipe.spike.action != "rollback":
                            raise
                        self._roll_back(metrics, progress, error)
                if not self._complete():
                    return self._interrupted(metrics)
                return self._finish(metrics)
        except (NonFiniteError, LossSpikeError, MemoryError, RuntimeError) as error:
            if not is_known(error):
                raise
            self.subject.trained.zero_grad(set_to_none=True)  # room for what is left to do
            self.saver.wait()
            self.ranks.wait_for_first()  # which knows only now what the last checkpoint is
            self._log_saves(metrics)
            reason, told = explain(error, self.setup, step=self.step + 1, latest=self.folder.latest())
            self._end(metrics, reason)
            self.ranks.wait_for_first()
            raise told from None
        finally:
            if failed := self.saver.close():
                self.tell(str(failed))
            self.profiler.close(self.step, tell=self.tell)
            if not frozen:
                gc.unfreeze()
            if collecting:
                gc.enable()
            metrics.close()

    def _complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.setup.recipe.train.steps or self.evaluator.finished() or self._out_of_data()

    def _out_of_data(self) -> bool:
        """Whether the limits of all sources leave no whole step: only where rollbacks have passed samples by."""
        end, most = self.next_sample + self.setup.recipe.train.batch_size, self.setup.stream.num_samples
        return most is not None and end > most

    def _one_step(self, metrics: MetricsFile, progress: Progress, share: steps.Share) -> None:
        recipe = self.setup.recipe
        loss, lack = self._gradients(share)
        self.shards.sum_gradients()
        result = steps.check_and_clip(
            self.subject.trained, loss, max_norm=recipe.optim.grad_clip, step=self.step + 1, shards=self.shards,
            told=Told(lack=lack, save=self.ranks.first and self.folder.save_requested()),
        )  # fmt: skip
        self.watch.check(result.loss, step=self.step + 1)
        factor = lr_factor(recipe.schedule, step=self.step, steps=recipe.train.steps, width=self.setup.config.width)
        self.optimizer.step(factor)
        self.subject.trained.zero_grad(set_to_none=True)
        self.shards.spread()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        first_sample = self.next_sample
        self.next_sample += recipe.train.batch_size
        self.loss = result.loss
        self.smoothed.update(result.loss)
        self.meter.end_step(tokens=share.counts[0], processed=share.processed)
        self.energy.keep_up()
        log_step(
            metrics, progress, self.setup, self.meter, result, self.smoothed, self.energy,
            step=self.step, first_step=self.first_step, rates=self.optimizer.learning_rates(factor),
            measures=lambda: self.ranks.mean(self.subject.measures()), memory_bytes=self._memory_bytes,
        )  # fmt: skip
        tell_ended(
            metrics, progress, self.setup.stream,
            step=self.step, first_sample=first_sample, next_sample=self.next_sample,
        )  # fmt: skip
        if self.evaluator.due(self.step):
            self.evaluator.run(metrics, progress, self.meter, step=self.step)
            gc.collect()
            self.meter.end_pause()
        self._log_saves(metrics)
        every = recipe.checkpoint.every
        due = bool(every) and self.step % every == 0
        if (result.save or due) and self.step < recipe.train.steps:
            self._save(metrics)

    def _gradients(self, share: steps.Share) -> tuple[Tensor, str | None]:
        """The loss of this rank's share, and what it ran out of memory by; alone it raises that."""
        try:
            return self.subject.gradients(self.setup, share.pieces, num_valid=share.counts), None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory.found_in(error):
                raise
            lack = self.ranks.keep(error, out_of_memory.first_sentence(error))
        self.subject.trained.zero_grad(set_to_none=True)
        return torch.zeros((), device=self.setup.device), lack

    def _memory_bytes(self) -> int:
        return self.shards.peak_memory_bytes(self.setup.device)

    def _save(self, metrics: MetricsFile, *, wait: bool = False) -> None:
        """Save this step; with `wait` it is on disk afterwards."""
        if self.saved_step != self.step:
            optimizer = self.ranks.collect("optimizer", self.optimizer.state_tensors())
            ema = self.ranks.collect("ema", {} if self.ema is None else self.ema.state_tensors())
            if self.ranks.first:
                recipe, state = self.setup.recipe, state_of(self)
                snapshot = Snapshot(
                    trained=self.subject.trained, optimizer=optimizer, ema=ema, recipe=recipe, state=state
                )
                self.saver.save(snapshot, wait=wait)
            self.saved_step = self.step
            gc.collect()
        if wait:
            self.saver.wait()
        self.ranks.wait_for_first()
        self.meter.end_pause()
        self._log_saves(metrics)

    def _log_saves(self, metrics: MetricsFile) -> None:
        """Log the checkpoints that have reached the disk; raises what went wrong where one did not."""
        for saved in self.saver.finished():
            log_saved(metrics, saved, tell=self.tell)

    def _roll_back(self, metrics: MetricsFile, progress: Progress, error: Divergence) -> None:
        """Go back to the last checkpoint, past the data since; raises `error` where that is not possible."""
        self.saver.wait()
        self.ranks.wait_for_first()
        self._log_saves(metrics)
        failed, after = self.step + 1, self.next_sample + self.setup.recipe.train.batch_size
        target, state = self.rollbacks.find(error)
        restore(self.subject, self.optimizer, self.ema, target, state)
        take(self, state)
        self.saved_step = state.step
        self.first_step = min(self.first_step, state.step)
        left_out = [self.next_sample, after]
        self.skipped.append(left_out)
        self.next_sample = after
        metrics.rewind(state.step)
        metrics.write("rollback", state.step, from_step=failed, reason=str(error), skipped=left_out)
        progress.message(f"{error}; going back to {target.name}, past samples {left_out[0]} to {left_out[1] - 1}")
        self.meter.end_pause()

    def _finish(self, metrics: MetricsFile) -> RunResult:
        self._save(metrics, wait=True)
        self.energy.update()
        final = self.folder.path / FINAL
        with self.evaluator.weights(self.setup.recipe.export.weights):
            if self.ranks.first:
                card = model_card(self.setup, read_run(self.folder.path), self._energy())
                self.folder.export(self.subject.trained, self.setup, card)
        if self.ranks.first:
            self.subject.finish(final)
        early = self.step < self.setup.recipe.train.steps
        if early:
            say(OUT_OF_DATA if self._out_of_data() else self.evaluator.why_finished())
        say(f"finished {self.step} steps in {format_duration(self.meter.seconds)}; the model is in {final}")
        return self._end(metrics, "stopped-early" if early else "finished", final)

    def _interrupted(self, metrics: MetricsFile) -> RunResult:
        self._save(metrics, wait=True)
        recipe = shlex.quote(str(self.folder.path / RECIPE))
        several = "" if self.ranks.place.count == 1 else f" --nproc {self.ranks.place.count}"
        say(f"stopped after step {self.step}, saved; continue with: trine train {recipe} --resume auto{several}")
        return self._end(metrics, "interrupted")

    def _end(self, metrics: MetricsFile, reason: str, final: Path | None = None) -> RunResult:
        self.energy.update()
        log_end(metrics, self.meter, self._energy(), step=self.step, reason=reason, memory_bytes=self._memory_bytes())
        validation = self.evaluator.last
        return RunResult(
            run_dir=self.folder.path,
            step=self.step,
            tokens=self.meter.tokens,
            seconds=self.meter.seconds,
            reason=reason,
            loss=self.loss,
            validation_loss=None if validation is None else validation.loss,
            bits_per_byte=None if validation is None else validation.bits_per_byte,
            final_dir=final,
        )

    def _energy(self) -> dict[str, Any]:
        return self.energy.summary(self.setup.recipe.energy.carbon_intensity)
