"""Line charts of a run as SVG that follows the reader's light or dark theme.

matplotlib draws with placeholder colours, one per role (`loss`, `validation`, `grid`, ...); afterwards each placeholder
becomes a CSS variable. The same drawing then serves the report page, whose style sheet sets the variables, and a
figure of its own in the README, which carries its style sheet inside. Text stays text: sharp, selectable, and in the
reader's font.

Beside the SVG a chart keeps what a pointer needs to read values off it: the plot area as fractions of the figure, the
range of x, and the points that were drawn.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

POINTS = 600  # points kept per line: more than a screen can show apart
# For lines that belong to different runs: apart in hue and in lightness, for readers who see only one of these.
RUN_ROLES = ("run0", "run1", "run2", "run3", "run4", "run5", "run6", "run7")
ROLES = ("loss", "raw", "validation", "plain", "second", "grid", "text", "resume", *RUN_ROLES)
# Placeholders that nothing else in a matplotlib figure uses.
_PLACEHOLDER = {role: f"#01fe{index:02x}" for index, role in enumerate(ROLES)}
_LIGHT = (
    "#1d5fd1", "#9dbcf0", "#d9600a", "#1d5fd1", "#d9600a", "#e4e6ea", "#626b78", "#9aa3af",
    "#1d5fd1", "#d9600a", "#12805c", "#a3299c", "#7a6a00", "#0b8fb3", "#b3261e", "#5b5f66",
)  # fmt: skip
_DARK = (
    "#7fb0ff", "#3d5f96", "#ffab66", "#7fb0ff", "#ffab66", "#2b3138", "#9aa4b2", "#66707d",
    "#7fb0ff", "#ffab66", "#5fd3a6", "#ee9be8", "#d9c84a", "#66d2ee", "#ff8f86", "#b9c0c9",
)  # fmt: skip
_FONT = "font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart: `xs` ascend, `role` picks the colour; `dots` marks each point."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    role: str = "plain"
    width: float = 1.6
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart: `svg` for the page, `readout` (JSON values) for the pointer."""

    svg: str
    readout: dict[str, object] = field(default_factory=dict)


def palette(theme: str) -> str:
    """CSS declarations `--chart-ROLE: colour` of the "light" or "dark" theme."""
    colours = {"light": _LIGHT, "dark": _DARK}[theme]
    return " ".join(f"--chart-{role}: {colour};" for role, colour in zip(ROLES, colours, strict=True))


def smooth(values: list[float]) -> list[float]:
    """Mean over a window centred on each value (a twentieth of the run, narrower at both ends): it does not lag."""
    half = max(len(values) // 40, 2)
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        result.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return result


def decimate(xs: Sequence[float], ys: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `points` of the points, in order: the lowest and the highest of each stretch, so no spike is lost."""
    if len(xs) <= points:
        return list(xs), list(ys)
    values = np.asarray(ys)
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), points // 2 - 1):
        kept.update((int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])))
    order = sorted(kept)
    return [float(xs[index]) for index in order], [float(ys[index]) for index in order]


def draw(
    lines: Sequence[Line],
    *,
    name: str,
    size: tuple[float, float],
    x_range: tuple[float, float],
    x_name: str = "step",
    format_x: Callable[[float], str] = "{:,.0f}".format,
    log_x: bool = False,
    marks: Sequence[float] = (),
    from_zero: bool = False,
    legend: str = "",
    format_y: Callable[[float], str] = "{:g}".format,
) -> Chart:
    """Draw `lines` against the step, or what `x_name` says.

    Args:
        lines: drawn in this order, the last on top.
        name: unique on a page; element ids are made from it.
        size: width and height in CSS pixels at scale 1; text is 11 pixels then.
        x_range: borders of the x axis, the right one above the left.
        x_name: what x is, at the pointer.
        format_x: how an x value is written, on the axis and at the pointer.
        log_x: whether the x axis is logarithmic.
        marks: where upright dashes stand, such as steps at which the run was resumed.
        from_zero: whether the y axis begins at zero.
        legend: title of a legend inside the chart; empty draws none (the page has its own).
        format_y: how a y value is written, on the axis and at the pointer.
    """
    width, height = size
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "axes.unicode_minus": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # the SVG unit is 1/72 inch, here a pixel
        left, bottom, right, above = 46 / width, 26 / height, 10 / width, 10 / height
        axes: Axes = figure.add_axes((left, bottom, 1 - left - right, 1 - bottom - above))
        _style(axes, format_x, format_y, log_x=log_x, ticks=round(height / 40))
        for mark in marks:
            axes.axvline(mark, color=_PLACEHOLDER["resume"], linewidth=1, linestyle=(0, (4, 3)), clip_on=False)
        drawn = []
        for line in lines:
            xs, ys = decimate(line.xs, line.ys)
            marker = "o" if line.dots or len(xs) == 1 else ""
            colour = _PLACEHOLDER[line.role]
            (artist,) = axes.plot(xs, ys, color=colour, linewidth=line.width, marker=marker, markersize=4.5)
            artist.set(label=line.label, clip_on=False)
            drawn.append(
                {
                    "label": line.label,
                    "role": line.role,
                    "points": [
                        [float(f"{x:.8g}"), float(f"{y:.5g}"), format_y(y), format_x(x)]
                        for x, y in zip(xs, ys, strict=True)
                    ],
                }
            )
        axes.set_xlim(*x_range)
        if from_zero:
            axes.set_ylim(0, 1.1 * max(max(line.ys) for line in lines) or 1)
        low, high = axes.get_ylim()
        if legend:
            text = _PLACEHOLDER["text"]
            axes.legend(title=legend, frameon=False, labelcolor=text, alignment="left").get_title().set_color(text)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    readout: dict[str, object] = {
        "area": [left, above, 1 - right, 1 - bottom],
        "x": list(x_range),
        "name": x_name,
        "y": [float(low), float(high)],
        "lines": drawn,
    }
    return Chart(svg=_to_page(buffer.getvalue(), name), readout=readout)


def standalone(chart: Chart) -> str:
    """The chart's SVG as a file of its own that follows the reader's theme."""
    style = f"svg {{ {palette('light')} }} @media (prefers-color-scheme: dark) {{ svg {{ {palette('dark')} }} }}"
    head, tag, rest = chart.svg.partition(">")
    head = re.sub(r' width="[^"]*" height="[^"]*"', "", head)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{tag}<style>{style}</style>{rest}\n'


def _style(
    axes: Axes, format_x: Callable[[float], str], format_y: Callable[[float], str], *, log_x: bool, ticks: int
) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_PLACEHOLDER["grid"])
    axes.grid(axis="y", color=_PLACEHOLDER["grid"], linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_PLACEHOLDER["text"], pad=6)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_x(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_y(value)))
    axes.margins(y=0.08)


def _to_page(text: str, name: str) -> str:
    """What matplotlib wrote, made fit to stand inside an HTML page."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # a rule for `*` would reach the whole page
    # Ids are unique in one figure only; those of markers are referred to, the rest are not.
    svg = re.sub(r' id="(?!m[0-9a-f]{10}")[^"]*"', "", svg)
    svg = re.sub(r'(id="|href="#)(?=m[0-9a-f]{10}")', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", rf"\1 sans-serif; {_FONT}", svg)
    svg = re.sub(r"font-size: ([\d.]+px); font-family: [^;\"]*", rf"font-size: \1; {_FONT}", svg)
    for role, colour in _PLACEHOLDER.items():
        svg = svg.replace(colour, f"var(--chart-{role})")
    return svg.strip()
