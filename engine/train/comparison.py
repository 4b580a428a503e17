"""`trine report RUN RUN ...`: one HTML page that sets runs side by side.

Every curve can be read against steps, tokens or training time. Evaluations are logged by step; their tokens and time
are those of the steps around them. The page stands by itself, as that of one run does (report.py).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trine.engine.errors import UsageError
from trine.engine.log import format_bytes, format_count, format_duration
from trine.engine.train.charts import RUN_ROLES, Line, draw, smooth
from trine.engine.train.energy import format_energy, format_mass
from trine.engine.train.recipe import OWN_SET
from trine.engine.train.report import Panel, fill, flatten, set_name, state_of
from trine.engine.train.run_log import Record, RunLog, read_run, series

TEMPLATE = "comparison.html.j2"
PAGE = "comparison.html"
_SIZE = (440, 220)
_AXES = ("step", "tokens", "time")
_UNKNOWN = "–"


@dataclass(frozen=True)
class Run:
    """One of the runs: its log, a name that no other has, and its colour."""

    log: RunLog
    name: str
    role: str


def write_comparison(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of two to eight runs to `out` (default: `comparison.html` here) and return its path.

    Raises `UsageError` or `DataError` (one line) where a run cannot be read or is named twice; nothing is written then.
    """
    if len(runs) > len(RUN_ROLES):
        raise UsageError(f"{len(runs)} runs are more than a page can tell apart; name at most {len(RUN_ROLES)}")
    folders = [run.resolve() for run in runs]
    twice = next((run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice; a run is compared with others")
    logs = [read_run(run) for run in runs]
    names = distinct_names(folders)
    page = render([Run(*entry) for entry in zip(logs, names, RUN_ROLES, strict=False)])
    path = out if out is not None else Path(PAGE)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    return fill(
        TEMPLATE,
        name=" · ".join(run.name for run in runs),
        runs=runs,
        rows=[(run, _facts(run.log)) for run in runs],
        panels=_panels(runs),
        recipe=_differences([dict(flatten(_without_place(run.log.recipe))) for run in runs]),
        environment=_differences([dict(flatten(run.log.start.get("environment", {}))) for run in runs]),
        samples=_samples(runs),
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, of equal depth."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


# ---- the table of runs


def _facts(log: RunLog) -> dict[str, str]:
    """What the table says of a run, by column."""
    last = log.steps[-1] if log.steps else {}
    _, validation = series(log.evaluations_by().get(log.judge, []), "loss")
    _, losses = series(log.steps, "loss")
    _, speeds = series(log.steps, "tokens_per_second")
    _, memory = series(log.steps, "memory_bytes")
    end = log.end or {}
    energy = end.get("energy", {})
    joules = energy.get("joules", last.get("joules"))
    grams = energy.get("co2e_grams")
    judge = "" if log.judge == (OWN_SET, "raw") else f" ({set_name(log.judge)})"
    tail = losses[-max(len(losses) // 20, 1) :]
    return {
        "State": state_of(log)[1],
        "Steps": f"{log.last_step:,}",
        "Tokens": format_count(last["tokens"]) if "tokens" in last else _UNKNOWN,
        "Time": format_duration(last["seconds"]) if "seconds" in last else _UNKNOWN,
        "Training loss": f"{statistics.fmean(tail):.4f}" if tail else _UNKNOWN,
        "Validation loss": f"{validation[-1]:.4f}{judge}" if validation else _UNKNOWN,
        "Best": f"{min(validation):.4f}" if validation else _UNKNOWN,
        "Tokens/s": format_count(statistics.median(speeds)) if speeds else _UNKNOWN,
        "Peak memory": format_bytes(end.get("peak_memory_bytes") or max(memory, default=0)) if log.steps else _UNKNOWN,
        "Energy": format_energy(joules) if isinstance(joules, float) else _UNKNOWN,
        "CO2e": format_mass(grams) if isinstance(grams, float) else _UNKNOWN,
    }


# ---- curves


def _panels(runs: Sequence[Run]) -> list[Panel]:
    plain: Callable[[float], str] = "{:.4g}".format
    steps = {run.name: run.log.steps for run in runs}
    panels = [
        _panel(runs, "Training loss", "nats per token, smoothed", steps, "loss", plain, smoothed=True),
        *_evaluation_panels(runs, plain),
        _panel(runs, "Learning rate", "AdamW", steps, "lr", plain, from_zero=True),
        _panel(runs, "Learning rate of Muon", "", steps, "muon_lr", plain, from_zero=True),
        _panel(runs, "Gradient norm", "before clipping", steps, "grad_norm", plain, from_zero=True),
        _panel(runs, "Speed", "tokens per second", steps, "tokens_per_second", format_count, from_zero=True),
        _panel(runs, "Memory", "GiB, peak", steps, "memory_bytes", plain, from_zero=True, unit_of_y=2**30),
        _panel(runs, "Energy", "joules so far", steps, "joules", format_energy, from_zero=True),
    ]
    return [panel for panel in panels if panel is not None]


def _evaluation_panels(runs: Sequence[Run], plain: Callable[[float], str]) -> list[Panel | None]:
    """One for every set and kind of weights that any run was evaluated with."""
    by_run = {run.name: run.log.evaluations_by() for run in runs}
    keys = list(dict.fromkeys(key for found in by_run.values() for key in found))
    return [
        _panel(
            runs,
            f"{set_name(key).capitalize()} loss",
            "nats per token",
            {name: found.get(key, []) for name, found in by_run.items()},
            "loss",
            plain,
            dots=True,
        )
        for key in keys
    ]


def _panel(
    runs: Sequence[Run],
    title: str,
    unit: str,
    records: dict[str, list[Record]],
    key: str,
    format_y: Callable[[float], str],
    *,
    smoothed: bool = False,
    unit_of_y: float = 1.0,
    from_zero: bool = False,
    dots: bool = False,
) -> Panel | None:
    """One chart for each x axis; None where no run has the number."""
    found = {}
    for run in runs:
        where, values = series(records[run.name], key)
        found[run.name] = where, [value / unit_of_y for value in values]
    shown = [run for run in runs if found[run.name][0]]
    if not shown:
        return None
    charts = []
    for axis in _AXES:
        lines = []
        for run in shown:
            steps, values = found[run.name]
            xs = _along(run.log, steps, axis)
            ys = smooth(values) if smoothed else values
            if xs is not None:
                lines.append(Line(label=run.name, xs=xs, ys=ys, role=run.role, width=1.8, dots=dots))
        if not lines:
            continue
        right = max(max(line.xs) for line in lines) or 1.0
        chart = draw(
            lines,
            name=f"{'-'.join(title.lower().split()).replace(',', '')}-{axis}",
            size=_SIZE,
            x_range=(0.0, right),
            x_name=axis,
            format_x={"step": "{:,.0f}".format, "tokens": format_count, "time": format_duration}[axis],
            from_zero=from_zero,
            format_y=format_y,
        )
        charts.append((f"by-{axis}", chart.svg, json.dumps(chart.readout, separators=(",", ":"))))
    last = "; ".join(
        f"{run.name} {format_y(found[run.name][1][-1])} at step {found[run.name][0][-1]:,.0f}" for run in shown
    )
    return Panel(title=title, unit=unit, legend=[(run.name, run.role) for run in shown], charts=charts,
                 alternative=f"{title}: {last}")  # fmt: skip


def _along(log: RunLog, steps: list[float], axis: str) -> list[float] | None:
    """Where on the x axis steps lie: themselves, or the tokens or seconds of training by then (None where unknown)."""
    if axis == "step":
        return steps
    known, values = series(log.steps, "tokens" if axis == "tokens" else "seconds")
    if not known:
        return None
    return [float(value) for value in np.interp(steps, [0.0, *known], [0.0, *values])]


# ---- recipes, environments, samples


def _without_place(recipe: dict[str, Any]) -> dict[str, Any]:
    """Where a run was written says nothing of what it is."""
    return {section: values for section, values in recipe.items() if section != "run"}


def _differences(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all, with each run's value."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, _UNKNOWN) for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _samples(runs: Sequence[Run]) -> list[tuple[str, list[tuple[Run, Record]]]]:
    """For each prompt, the newest sample of every run that has one."""
    prompts = dict.fromkeys(record["prompt"] for run in runs for record in run.log.samples)
    found = []
    for prompt in prompts:
        newest = [(run, [record for record in run.log.samples if record["prompt"] == prompt]) for run in runs]
        found.append((prompt, [(run, records[-1]) for run, records in newest if records]))
    return found
