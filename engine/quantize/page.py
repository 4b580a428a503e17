"""The report as one HTML page that stands by itself: what was gained and lost, and a chart of every layer's error.

Style and chart (SVG) are inside it, and its content security policy forbids the browser any request. Colours follow the
reader's light or dark theme: matplotlib draws with placeholders, each of which becomes a CSS variable.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Placeholders that nothing else in a figure uses, with their colours in a light and in a dark theme.
_LINES = ("#1d5fd1", "#d9600a", "#2c8a3e", "#a8338f", "#8a6d00", "#0f8a94", "#c22e3a", "#626b78")
_DARK_LINES = ("#7fb0ff", "#ffab66", "#7fd48f", "#f08fdc", "#e0c35a", "#6fdbe4", "#ff8d95", "#9aa4b2")
_GRID, _TEXT = ("#e4e6ea", "#2b3138"), ("#626b78", "#9aa4b2")
_NAMES = [f"line{number}" for number in range(len(_LINES))] + ["grid", "text"]
_PLACEHOLDERS = {name: f"#02fd{number:02x}" for number, name in enumerate(_NAMES)}
_COLOURS = {
    "light": [*_LINES, _GRID[0], _TEXT[0]],
    "dark": [*_DARK_LINES, _GRID[1], _TEXT[1]],
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1a1f26;
  background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .8rem .2rem 0; text-align: right }
td:first-child, th:first-child, .facts td { text-align: left }
th { font-weight: 600 } tr { border-bottom: 1px solid #8884 }
.note { color: #626b78 }
@media (prefers-color-scheme: dark) { body { color: #e4e8ee; background: #14181d } .note { color: #9aa4b2 } }
"""


def make_page(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    errors: Mapping[str, Sequence[float]],
    what: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    note: str,
) -> str:
    """HTML.

    Args:
        title: heading.
        facts: name and value, a line each.
        errors: of the chart, a line for each kind of layer, by number of the layer.
        what: what these errors are.
        columns: of the table of all layers.
        rows: of that table.
        note: stands at the end.
    """
    variables = {
        theme: " ".join(f"--{name}: {colour};" for name, colour in zip(_NAMES, colours, strict=True))
        for theme, colours in _COLOURS.items()
    }
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    lines = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}
:root {{ {variables["light"]} }} @media (prefers-color-scheme: dark) {{ :root {{ {variables["dark"]} }} }}</style>
</head><body>
<h1>{escape(title)}</h1>
<table class="facts">{lines}</table>
<h2>{escape(what)}, by layer</h2>
{draw(errors)}
<h2>All layers</h2>
<table><tr>{head}</tr>
{body}</table>
<p class="note">{escape(note)}</p>
</body></html>
"""


def draw(errors: Mapping[str, Sequence[float]]) -> str:
    """An SVG element: a line for each kind, over the number of the layer."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "quantize", "font.size": 11, "axes.unicode_minus": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(900 / 72, 300 / 72), dpi=72)
        axes = figure.add_axes((0.07, 0.1, 0.72, 0.86))
        for number, (kind, values) in enumerate(errors.items()):
            colour = _PLACEHOLDERS[_NAMES[number % len(_LINES)]]
            style = ("-", "--", ":")[number // len(_LINES) % 3]
            axes.plot(range(len(values)), values, style, color=colour, marker="o", markersize=4, label=kind)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.grid(axis="y", color=_PLACEHOLDERS["grid"])
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=_PLACEHOLDERS["text"])
        for side in axes.spines.values():
            side.set_visible(False)
        axes.legend(frameon=False, labelcolor=_PLACEHOLDERS["text"], loc="upper left", bbox_to_anchor=(1.01, 1))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, colour in _PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def by_kind(values: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """(kind, value) in the order of the layers, as lines."""
    found: dict[str, list[float]] = defaultdict(list)
    for kind, value in values:
        found[kind].append(value)
    return dict(found)
