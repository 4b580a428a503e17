"""What is said and logged: before the first step, after each, and once a checkpoint is on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trine.engine.env import load_average, physical_cores
from trine.engine.log import counted, format_bytes, format_duration, say, warn
from trine.engine.model.cost import count_parameters
from trine.engine.train.energy import EnergyMeter, energy_line
from trine.engine.train.evaluation import who_decides
from trine.engine.train.meters import Meter, SmoothedLoss
from trine.engine.train.metrics import MetricsFile
from trine.engine.train.mixing import source_lines
from trine.engine.train.plan import describe
from trine.engine.train.progress import Progress, Status
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import Setup
from trine.engine.train.run_folder import RunFolder
from trine.engine.train.saver import Saved
from trine.engine.train.step import StepResult
from trine.engine.train.subject_cost import trained_parameters
from trine.engine.train.tensorboard import FOLDER as TENSORBOARD
from trine.engine.train.tensorboard import TensorBoard


def open_metrics(folder: RunFolder, recipe: Recipe, *, after: int | None) -> MetricsFile:
    """The metrics of a run that begins anew, or goes on `after` a step."""
    metrics = MetricsFile.create(folder.metrics) if after is None else MetricsFile.resume(folder.metrics, step=after)
    if recipe.log.tensorboard:
        metrics.mirror_in(TensorBoard(folder.path / TENSORBOARD))
    return metrics


def log_start(metrics: MetricsFile, setup: Setup, meter: Meter, *, peak_source: str, facts: dict[str, Any]) -> None:
    """The `start` line of a new run."""
    recipe = setup.recipe
    metrics.write(
        "start",
        0,
        time=time.time(),
        environment=facts,
        parameters=count_parameters(setup.config).total,
        trained_parameters=trained_parameters(setup),
        flops_per_token=meter.flops_per_token,
        peak_flops=meter.peak_flops,
        peak_source=peak_source,
        steps=recipe.train.steps,
        tokens_per_step=round(recipe.train.batch_size * setup.stream.tokens_per_sample),
    )


def log_step(
    metrics: MetricsFile,
    progress: Progress,
    setup: Setup,
    meter: Meter,
    result: StepResult,
    smoothed: SmoothedLoss,
    energy: EnergyMeter,
    *,
    step: int,
    first_step: int,
    rates: dict[str, float],
    measures: Callable[[], dict[str, float]],
    memory_bytes: Callable[[], int],
) -> None:
    """The `step` line where one is due, with what the objective measured, and the line on the screen."""
    recipe = setup.recipe
    due = step % recipe.log.every == 0 or step in (1, recipe.train.steps)
    if due:
        energy.update()
        metrics.write(
            "step",
            step,
            tokens=meter.tokens,
            loss=result.loss,
            **rates,
            grad_norm=result.grad_norm,
            **measures(),
            tokens_per_second=meter.tokens_per_second,
            mfu=meter.mfu,
            seconds=meter.seconds,
            memory_bytes=memory_bytes(),
            joules=energy.known,
        )
    if due or progress.live:
        left = recipe.train.steps - step
        progress.show(
            Status(
                step=step,
                steps=recipe.train.steps,
                loss=smoothed.value,
                rates=rates,
                grad_norm=result.grad_norm,
                tokens_per_second=meter.tokens_per_second,
                mfu=meter.mfu,
                memory_bytes=memory_bytes(),
                seconds_left=meter.seconds_left(steps_done=step - first_step, steps_left=left),
            )
        )


def log_saved(metrics: MetricsFile, saved: Saved, *, tell: Callable[[str], None]) -> None:
    """The `checkpoint` line, and what the save cost."""
    metrics.write(
        "checkpoint",
        saved.step,
        path=saved.path.name,
        bytes=saved.num_bytes,
        held_seconds=saved.held_seconds,
        write_seconds=saved.write_seconds,
    )
    tell(
        f"step {saved.step} saved: {format_bytes(saved.num_bytes)} in {format_duration(saved.write_seconds)}, "
        f"training held up for {format_duration(saved.held_seconds)}"
    )


def log_end(
    metrics: MetricsFile, meter: Meter, energy: dict[str, Any], *, step: int, reason: str, memory_bytes: int
) -> None:
    """The `end` line, and what was spent."""
    say(energy_line(energy))
    metrics.write(
        "end",
        step,
        reason=reason,
        seconds=meter.seconds,
        tokens=meter.tokens,
        peak_memory_bytes=memory_bytes,
        energy=energy,
    )


def announce(setup: Setup, meter: Meter, *, peak_source: str) -> None:
    """What is trained on what; what MFU is a share of; a warning where the machine is busy."""
    say(describe(setup))
    train = setup.recipe.train
    for line in source_lines(setup.stream, num_samples=train.steps * train.batch_size, batch_size=train.batch_size):
        say(line)
    if decides := who_decides(setup.recipe):
        say(decides)
    if meter.peak_flops:
        say(f"MFU is the share of a {peak_source} peak of {meter.peak_flops / 1e12:.3g} TFLOP/s")
    load, cores = load_average()[0], physical_cores()
    if setup.device.type == "cpu" and load > cores:
        warn(f"load is {load:.1f} on {cores} cores; training with {counted(setup.threads, 'thread')} may be slow")
