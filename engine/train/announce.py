"""What is said and logged before the first step."""

from __future__ import annotations

import time
from typing import Any

from trine.engine.env import load_average, physical_cores
from trine.engine.log import say, warn
from trine.engine.model.cost import count_parameters
from trine.engine.train.meters import Meter
from trine.engine.train.metrics import MetricsFile
from trine.engine.train.plan import describe
from trine.engine.train.resolve import Setup


def log_start(metrics: MetricsFile, setup: Setup, meter: Meter, *, peak_source: str, facts: dict[str, Any]) -> None:
    """The `start` line of a new run."""
    recipe = setup.recipe
    metrics.write(
        "start",
        0,
        time=time.time(),
        environment=facts,
        parameters=count_parameters(setup.config).total,
        flops_per_token=meter.flops_per_token,
        peak_flops=meter.peak_flops,
        peak_source=peak_source,
        steps=recipe.train.steps,
        tokens_per_step=recipe.train.batch_size * recipe.data.seq_len,
    )


def announce(setup: Setup, meter: Meter, *, peak_source: str) -> None:
    """What is trained on what; what MFU is a share of; a warning where the machine is busy."""
    say(describe(setup))
    if meter.peak_flops:
        say(f"MFU is the share of a {peak_source} peak of {meter.peak_flops / 1e12:.3g} TFLOP/s")
    load, cores = load_average()[0], physical_cores()
    if setup.device.type == "cpu" and load > cores:
        warn(f"load is {load:.1f} on {cores} cores; training with {setup.threads} threads may be slow")
