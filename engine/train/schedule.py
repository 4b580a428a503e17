"""Learning-rate schedules: pure functions of the step.

A schedule is a factor by which every learning rate of the recipe is multiplied, in [0, 1] but for noam. It is computed
from the number of updates already made (`step`, from 0), so nothing about it has to be saved. With W warm-up steps and
N steps:

    warm-up        (step + 1) / W                                   for step < W, reaching 1 at step W - 1
    constant       1
    cosine         r + (1 - r) * (1 + cos(pi p)) / 2                p = (step - W) / (N - W), r = final_ratio
    linear         r + (1 - r) * (1 - p)
    wsd            1, then linear to r over the last `decay_fraction` of all N steps  (warm-up, stable, decay)
    inverse_sqrt   sqrt(max(W, 1) / (step + 1))                     Raffel et al. 2020
    noam           C^-0.5 min((step + 1)^-0.5, (step + 1) W^-1.5)    warm-up included; Vaswani et al. 2017, section 5.3

With noam, C is the width of the model and `optim.lr` a scale, 1.0 in the paper.

p never reaches 1 during training (the last step is N - 1), so that no update is made with a rate of zero.
"""

from __future__ import annotations

import math

from trine.engine.train.recipe import ScheduleSettings


def lr_factor(schedule: ScheduleSettings, *, step: int, steps: int, width: int) -> float:
    """Factor on the learning rates for the update number `step` (from 0) of `steps`, of a model of this `width`."""
    warmup = schedule.warmup_steps
    if schedule.kind == "noam":
        return float(width**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5))
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":
        return math.sqrt(max(warmup, 1) / (step + 1))
    ratio = schedule.resolved_final_ratio
    if schedule.kind == "wsd":
        decay_steps = max(1, round(schedule.resolved_decay_fraction * steps))
        progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
    else:
        progress = (step - warmup) / max(1, steps - warmup)
    progress = min(1.0, progress)
    falling = (1.0 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1.0 - progress
    return ratio + (1.0 - ratio) * falling
