"""Schedules at points computed by hand."""

from __future__ import annotations

import math

import pytest

from trine.engine.train.recipe import ScheduleSettings
from trine.engine.train.schedule import lr_factor


def factors(settings: ScheduleSettings, steps: int) -> list[float]:
    return [lr_factor(settings, step=step, steps=steps, width=1) for step in range(steps)]


def test_warmup_rises_linearly_and_reaches_one_on_its_last_step() -> None:
    found = factors(ScheduleSettings(kind="constant", warmup_steps=4), 8)
    assert found == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_cosine() -> None:
    found = factors(ScheduleSettings(kind="cosine", warmup_steps=2, final_ratio=0.2), 6)
    expected = [0.5, 1.0, 1.0, 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2]
    assert found == pytest.approx(expected, abs=1e-15)


def test_linear_never_reaches_zero_during_training() -> None:
    assert factors(ScheduleSettings(kind="linear"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_wsd_is_flat_and_then_falls_over_the_last_fraction() -> None:
    found = factors(ScheduleSettings(kind="wsd", warmup_steps=2, decay_fraction=0.4, final_ratio=0.5), 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625])


def test_inverse_sqrt_continues_the_warmup_without_a_jump() -> None:
    found = factors(ScheduleSettings(kind="inverse_sqrt", warmup_steps=4), 16)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[15] == pytest.approx(0.5)
    assert found[4] == pytest.approx(math.sqrt(4 / 5))


@pytest.mark.parametrize(("width", "warmup"), [(512, 4000), (128, 100), (64, 1)])
def test_noam_is_the_formula_of_the_paper(width: int, warmup: int) -> None:
    settings = ScheduleSettings(kind="noam", warmup_steps=warmup)
    for step in (1, 2, warmup // 2 + 1, warmup, warmup + 1, 10 * warmup):  # the paper counts from 1
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert lr_factor(settings, step=step - 1, steps=1, width=width) == pytest.approx(expected, rel=1e-14)
    if warmup == 4000:
        assert lr_factor(settings, step=3999, steps=1, width=512) == pytest.approx(6.98771e-4, rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_factors_stay_within_zero_and_one_and_fall_after_the_warmup(kind: str, warmup: int) -> None:
    found = factors(ScheduleSettings.model_validate({"kind": kind, "warmup_steps": warmup}), 50)
    assert all(0 < factor <= 1 for factor in found)
    assert all(later <= earlier for earlier, later in zip(found[warmup:], found[warmup + 1 :], strict=False))
