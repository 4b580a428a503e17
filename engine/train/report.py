"""`trine report`: one HTML page that tells what happened in a run.

The page stands by itself: style, charts (inline SVG) and the few lines of script are inside it, and its content
security policy forbids the browser any request. It is written from the run folder alone, so it works on a run in
progress, on one that was interrupted and resumed, and on a machine without the data.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from trine.engine.errors import DataError
from trine.engine.log import format_bytes, format_count, format_duration
from trine.engine.storage import writing
from trine.engine.train.charts import RUN_ROLES, Chart, Line, draw, palette, smooth, standalone
from trine.engine.train.energy import format_energy, format_mass
from trine.engine.train.recipe import OWN_SET
from trine.engine.train.run_log import Record, RunLog, measure_name, read_run, series

TEMPLATE = "report.html.j2"
_WIDE, _NARROW, _HALF = (920, 300), (420, 260), (440, 200)


@dataclass(frozen=True)
class Tile:
    """One summary number: what it is, the number, and a remark under it."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart of the page with its heading; `narrow` is the drawing for small screens, where there is one."""

    title: str
    unit: str
    legend: list[tuple[str, str]]
    charts: list[tuple[str, str, str]]  # (CSS class, SVG, readout as JSON)
    alternative: str


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in folder `run` to `out` (default: `report.html` in it) and return its path.

    Raises `UsageError` or `DataError` (one line) where `run` is no readable run folder, `StorageError`
    where there is no room; nothing is written then.
    """
    log = read_run(run)
    page = render(log)
    path = out if out is not None else run / "report.html"
    partial = path.with_name(path.name + ".partial")
    with writing(path, partial):
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    return path


def save_loss_figure(run: Path, out: Path) -> Path:
    """Write the loss chart of a run as an SVG file, for a README; it follows the reader's light or dark theme."""
    log = read_run(run)
    lines = _loss_lines(log)
    if not lines:
        raise DataError(f"the run in {run} has logged no loss yet: there is nothing to draw")
    chart = draw(lines, name="loss", size=(760, 300), x_range=(0, _last_step(log)), legend=f"{log.loss_unit}, by step")
    out.write_text(standalone(chart), encoding="utf-8")
    return out


def render(log: RunLog) -> str:
    """The page as text."""
    return fill(
        TEMPLATE,
        name=log.folder.resolve().name,
        state=state_of(log),
        subtitle=_subtitle(log),
        tiles=_tiles(log),
        panels=_panels(log),
        evaluations=_evaluations(log),
        samples=_samples(log),
        between="" if log.objective == "causal_lm" else " → ",
        resumed=bool(log.resumed_at),
        recipe=_sections(log.recipe),
        environment=list(flatten(log.start.get("environment", {}))),
        last_line=datetime.fromtimestamp(log.written).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
    )


def fill(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file."""
    folder = resources.files("trine.engine.train")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(
        light=palette("light"),
        dark=palette("dark"),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **values,
    )


# ---- what the run says about itself


def state_of(log: RunLog) -> tuple[str, str]:
    """(CSS class, words) of the run's state."""
    if log.end is None:
        return "running", "in progress"
    reason = str(log.end.get("reason"))
    return {"finished": "finished", "stopped-early": "finished", "interrupted": "interrupted"}.get(
        reason, "failed"
    ), reason


def _total_steps(log: RunLog) -> int | None:
    steps = log.recipe.get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _last_step(log: RunLog) -> int:
    """Right border of the charts: the recipe's last step for a run in progress would leave them empty at first."""
    return max([log.last_step, *(int(record["step"]) for record in log.evaluations), 1])


def _subtitle(log: RunLog) -> str:
    model = log.recipe.get("model", {})
    parts = []
    family = model.get("family")
    if isinstance(family, str):
        parts.append(f"{family} family")
    if "time" in log.start:
        started = datetime.fromtimestamp(log.start["time"]).astimezone()
        parts.append("started " + started.strftime("%Y-%m-%d %H:%M"))
    if log.resumed_at:
        parts.append("resumed at step " + ", ".join(f"{step:,}" for step in log.resumed_at))
    return " · ".join(parts)


def _tiles(log: RunLog) -> list[Tile]:
    total = _total_steps(log)
    of = f"of {total:,}" if total else ""
    if total and log.last_step < total:
        of += f" ({100 * log.last_step / total:.0f} %)"
    tiles = [Tile("Steps", f"{log.last_step:,}", of)]
    if "parameters" in log.start:
        tiles.append(Tile("Parameters", format_count(log.start["parameters"])))
    return [*tiles, *_loss_tiles(log), *_speed_tiles(log)]


def _loss_tiles(log: RunLog) -> Iterator[Tile]:
    _, losses = series(log.steps, "loss")
    deciding = log.evaluations_by().get(log.judge, [])
    evaluated, validation = series(deciding, "loss")
    if validation:
        best = min(validation)
        at = int(evaluated[validation.index(best)])
        remark = log.loss_unit if best == validation[-1] else f"{log.loss_unit}; best {best:.4f} at step {at:,}"
        shown = "" if log.judge == (OWN_SET, "raw") else f" ({set_name(log.judge)})"
        yield Tile(f"Validation loss{shown}", f"{validation[-1]:.4f}", remark)
        if log.loss_unit == "nats per token":
            yield Tile("Perplexity", _short(math.exp(min(validation[-1], 700))), "validation, per token")
    for key in log.scores():
        _, values = series(deciding, key)
        if values:
            yield Tile(_capital(measure_name(key)), f"{values[-1]:.4f}", "validation")
    if losses:
        window = losses[-max(len(losses) // 20, 1) :]
        yield Tile("Training loss", f"{statistics.fmean(window):.4f}", f"mean of the last {len(window)} logged")


def _speed_tiles(log: RunLog) -> Iterator[Tile]:
    if log.steps:
        last = log.steps[-1]
        if "tokens" in last:
            yield Tile("Tokens trained", format_count(last["tokens"]))
        if "seconds" in last:
            yield Tile("Training time", format_duration(last["seconds"]), "without evaluations and checkpoints")
    _, speeds = series(log.steps, "tokens_per_second")
    _, utilisations = series(log.steps, "mfu")
    if speeds:
        remark = "median"
        if utilisations:
            percent = 100 * statistics.median(utilisations)
            remark += f"; {percent:.0f} % of the {log.start.get('peak_source', '')} peak FLOP/s"
        yield Tile("Tokens per second", format_count(statistics.median(speeds)), remark)
    _, memory = series(log.steps, "memory_bytes")
    peak = (log.end or {}).get("peak_memory_bytes") or max(memory, default=0)
    if peak:
        yield Tile("Peak memory", format_bytes(peak))
    _, joules = series(log.steps, "joules")
    energy = (log.end or {}).get("energy", {})
    if isinstance(energy.get("joules"), float):
        remark = f"{format_mass(energy['co2e_grams'])} CO2e at {energy['carbon_intensity']:g} g/kWh"
        yield Tile("Energy", format_energy(energy["joules"]), remark)
    elif joules:
        yield Tile("Energy", format_energy(joules[-1]), "so far")
    elif energy:
        yield Tile("Energy", "unknown", "; ".join(energy["uncounted"]))


def _evaluations(log: RunLog) -> dict[str, list[Any]]:
    """`columns` and `rows` of the table: step, then loss and scores of every set and kind of weights."""
    by_set, measures = log.evaluations_by(), ["loss", *log.scores()]
    columns, width = ["Step"], len(measures)
    for key in by_set:
        columns += [f"{set_name(key).capitalize()} loss", *(_capital(measure_name(one)) for one in measures[1:])]
    rows: dict[int, list[str]] = {}
    for place, records in enumerate(by_set.values()):
        for record in records:
            row = rows.setdefault(int(record["step"]), [f"{record['step']:,}", *[""] * (width * len(by_set))])
            for offset, value in enumerate(map(record.get, measures), start=1 + width * place):
                row[offset] = f"{value:.4f}" if isinstance(value, float) else ""
    return {"columns": columns, "rows": [rows[step] for step in sorted(rows)]}


def set_name(key: tuple[str, str]) -> str:
    """How a set and kind of weights are called on a page."""
    return f"{key[0]}, averaged" if key[1] == "ema" else key[0]


def _samples(log: RunLog) -> list[tuple[int, list[Record]]]:
    """(step, samples) newest first."""
    steps = sorted({int(record["step"]) for record in log.samples}, reverse=True)
    return [(step, [record for record in log.samples if record["step"] == step]) for step in steps]


def _sections(table: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The recipe as (section, rows); keys outside any section come first, under an empty name."""
    loose = {key: value for key, value in table.items() if not isinstance(value, dict)}
    sections = [(name, list(flatten(value))) for name, value in table.items() if isinstance(value, dict)]
    return ([("", list(flatten(loose)))] if loose else []) + [(name, rows) for name, rows in sections if rows]


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of nested tables and their values, as shown on a page."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}[{index}]")
    elif isinstance(value, list):
        yield prefix, ", ".join(map(_plain, value)) or "none"
    elif isinstance(value, int) and prefix.endswith("_bytes"):
        yield prefix.removesuffix("_bytes"), format_bytes(value)
    else:
        yield prefix, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, str) and value != value.strip():
        return json.dumps(value)  # shows spaces and line ends that would not be seen
    return str(value)


# ---- charts


def _loss_lines(log: RunLog) -> list[Line]:
    steps, losses = series(log.steps, "loss")
    lines = []
    if losses:
        lines.append(Line(label="training", xs=steps, ys=losses, role="raw", width=1.0))
        lines.append(Line(label="training, smoothed", xs=steps, ys=smooth(losses), role="loss", width=2.0))
    roles = ["validation", *RUN_ROLES[2:]]
    for place, (key, records) in enumerate(log.evaluations_by().items()):
        steps, losses = series(records, "loss")
        if losses:
            role = roles[place % len(roles)]
            lines.append(Line(label=set_name(key), xs=steps, ys=losses, role=role, width=2.0, dots=True))
    return lines


def _score_lines(log: RunLog) -> list[Line]:
    """What is a share or a correlation, of the set that decides."""
    lines, records = [], log.evaluations_by().get(log.judge, [])
    shown = [key for key in log.scores() if key not in ("bits_per_byte", "next_sentence_loss")]
    for role, key in zip(["validation", *RUN_ROLES[2:]], shown, strict=False):
        steps, values = series(records, key)
        if values:
            lines.append(Line(label=measure_name(key), xs=steps, ys=values, role=role, width=2.0, dots=True))
    return lines


def _panels(log: RunLog) -> list[Panel]:
    plain: Callable[[float], str] = "{:.4g}".format
    rates = [
        Line(label=label, xs=steps, ys=values, role=role, width=2.0)
        for key, label, role in (("lr", "AdamW", "plain"), ("muon_lr", "Muon", "second"))
        for steps, values in [series(log.steps, key)]
        if values
    ]
    panels = [_panel(log, "Loss", log.loss_unit, _loss_lines(log), sizes=[_WIDE, _NARROW], format_y=plain)]
    panels.append(_panel(log, "Scores", "validation", _score_lines(log), sizes=[_WIDE, _NARROW], format_y=plain))
    panels.append(_panel(log, "Learning rate", "", rates, from_zero=True, format_y=plain))
    for key, title, unit, from_zero, format_y in (
        ("grad_norm", "Gradient norm", "before clipping", True, plain),
        ("reward_accuracy", "Reward accuracy", "pairs of each batch the right way round", True, plain),
        ("reward_margin", "Reward margin", "of the pairs of each batch", False, plain),
        ("busiest_expert", "Busiest expert", "tokens, in even shares", True, plain),
        ("tokens_per_second", "Speed", "tokens per second", True, format_count),
        ("memory_bytes", "Memory", "GiB", True, plain),
        ("joules", "Energy", "joules", True, format_energy),
    ):
        steps, values = series(log.steps, key)
        if unit == "GiB":
            values = [value / 2**30 for value in values]
        lines = [Line(label=title.lower(), xs=steps, ys=values, width=1.4)] if values else []
        panels.append(_panel(log, title, unit, lines, from_zero=from_zero, format_y=format_y))
    return [panel for panel in panels if panel is not None]


def _panel(
    log: RunLog,
    title: str,
    unit: str,
    lines: list[Line],
    *,
    format_y: Callable[[float], str],
    sizes: list[tuple[int, int]] | None = None,
    from_zero: bool = False,
) -> Panel | None:
    if not lines:
        return None
    charts = []
    for css_class, size in zip(("wide", "narrow") if sizes else ("only",), sizes or [_HALF], strict=True):
        chart = draw(
            lines,
            name=f"{title.split()[0].lower()}-{css_class}",
            size=size,
            x_range=(0, _last_step(log)),
            marks=log.resumed_at,
            from_zero=from_zero,
            format_y=format_y,
        )
        charts.append((css_class, chart.svg, _json(chart)))
    last = "; ".join(f"{line.label} {format_y(line.ys[-1])} at step {line.xs[-1]:,.0f}" for line in lines)
    legend = [(line.label, line.role) for line in lines] if len(lines) > 1 else []
    return Panel(title=title, unit=unit, legend=legend, charts=charts, alternative=f"{title} against the step: {last}")


def _json(chart: Chart) -> str:
    return json.dumps(chart.readout, separators=(",", ":"))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 1000 else format_count(number)
