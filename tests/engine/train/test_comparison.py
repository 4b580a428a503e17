"""The page of several runs: curves over three axes, what differs, samples side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trine.engine.errors import DataError, UsageError
from trine.engine.train.comparison import distinct_names, write_comparison

RECIPE = """
[model]
family = "llama"
width = {width}
[optim]
lr = {lr}
[train]
steps = 60
[run]
dir = "{name}"
"""


def write_run(
    folder: Path, *, lr: float = 0.001, width: int = 64, batch: int = 1000, joules: bool = True, ended: bool = True,
    weights: tuple[str, ...] = ("raw",),
) -> Path:  # fmt: skip
    """A run of 60 steps, each of `batch` tokens and 0.5 s; evaluated at steps 25 and 50, between two logged steps."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(lr=lr, width=width, name=folder.name))
    environment = {"torch": "2.13.0", "threads": 2}
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "time": 1.79e9, "environment": environment}]
    for step in range(2, 61, 2):
        records.append(
            {
                "kind": "step", "step": step, "tokens": batch * step, "loss": 3 + 100 * lr + 5 * math.exp(-step / 20),
                "lr": lr, "grad_norm": 1.0, "tokens_per_second": 2 * batch, "seconds": 0.5 * step,
                "memory_bytes": 2**30, "joules": 10.0 * step if joules else None,
            }
        )  # fmt: skip
        for at in (25, 50):
            if step <= at < step + 2:
                losses = {"raw": 3.5, "ema": 3.4}
                records += [
                    {"kind": "eval", "step": at, "set": "validation", "weights": kind, "loss": losses[kind] + 100 * lr}
                    for kind in weights
                ]
                records.append({"kind": "sample", "step": at, "prompt": "<Ada>", "text": f" {folder.name} at {at}"})
    if ended:
        energy = {"joules": 600.0 if joules else None, "co2e_grams": 0.5 if joules else None, "carbon_intensity": 473}
        records.append({"kind": "end", "step": 60, "reason": "finished", "energy": energy, "peak_memory_bytes": 2**30})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


class Page(HTMLParser):
    """Text, readouts of the charts by title and axis, and the rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self._inside, self._title = "", "", ""
        self.charts: dict[tuple[str, str], dict[str, Any]] = {}
        self.rows: list[list[str]] = []
        self.references: set[str] = set()
        self._in_table = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._inside = tag
        if "data-readout" in found:
            axis = (found["class"] or "").removeprefix("chart by-")
            self.charts[self._title, axis] = json.loads(found["data-readout"] or "")
        self.references |= {found[key] or "" for key in ("src", "href", "xlink:href") if key in found}
        self._in_table |= tag == "table"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag == "h3":
            self._title = ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag in ("style", "script", "table") else self._inside
        self._in_table &= tag != "table"

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            return
        self.text += data
        if self._inside == "h3" and data.strip():
            self._title += data.strip()
        if self._in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def page_of(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_comparison(runs, tmp_path / "page.html").read_text())


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=0.01, batch=4000, joules=False, ended=False)


def test_every_curve_stands_over_steps_tokens_and_time(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    page = page_of(tmp_path, *runs)
    titles = {title for title, _ in page.charts}
    assert titles == {
        "Training loss", "Validation loss", "Learning rate", "Gradient norm", "Speed", "Memory", "Energy",
    }  # fmt: skip
    assert {axis for title, axis in page.charts if title == "Training loss"} == {"step", "tokens", "time"}
    for (title, axis), chart in page.charts.items():
        assert chart["name"] == axis
        assert [line["label"] for line in chart["lines"]] == (["one"] if title == "Energy" else ["one", "two"])
    first, second = page.charts["Validation loss", "tokens"]["lines"]
    # Logged at steps 25 and 50 between steps of 1,000 or 4,000 tokens.
    assert [point[0] for point in first["points"]] == [25_000, 50_000]
    assert [point[0] for point in second["points"]] == [100_000, 200_000]
    assert [point[0] for point in page.charts["Validation loss", "time"]["lines"][0]["points"]] == [12.5, 25.0]
    assert [point[1] for point in first["points"]] == pytest.approx([3.6, 3.6])
    assert page.charts["Training loss", "tokens"]["x"] == [0.0, 240_000]


def test_the_table_and_the_differences(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    page = page_of(tmp_path, *runs)
    rows = {row[0]: row for row in page.rows if row}
    assert rows["one"][1:4] == ["finished", "60", "60k"]
    assert rows["two"][1:4] == ["in progress", "60", "240k"]
    assert rows["one"][-2:] == ["600 J", "0.5 g"]
    assert rows["two"][-2:] == ["–", "–"]
    assert rows["optim.lr"] == ["optim.lr", "0.001", "0.01"]
    assert "model.width" not in rows  # the same in both
    assert "run.dir" not in rows
    assert "The same in all runs." in page.text  # the environments


def test_samples_stand_side_by_side(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    page = page_of(tmp_path, *runs)
    assert "one, step 50" in page.text
    assert "<Ada> two at 50" in page.text
    assert "at 25" not in page.text


def test_sets_and_averages_that_only_one_run_has_are_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b", weights=("raw", "ema")))
    averaged = page.charts["Validation, averaged loss", "step"]
    assert [line["label"] for line in averaged["lines"]] == ["b"]
    assert averaged["lines"][0]["points"][0][:2] == [25, pytest.approx(3.5)]


def test_the_page_asks_the_network_for_nothing(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert {reference for reference in Page(text).references if not reference.startswith("#")} == {"data:,"}
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 3


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert distinct_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert distinct_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]


def test_what_cannot_be_compared_is_one_clear_line(
    tmp_path: Path, runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(UsageError, match=r"one/?\.* is named twice|one is named twice"):
        write_comparison([runs[0], runs[0]], page)
    with pytest.raises(UsageError, match=r"no run folder at .*nowhere"):
        write_comparison([runs[0], tmp_path / "nowhere"], page)
    with pytest.raises(UsageError, match="9 runs are more than a page can tell apart; name at most 8"):
        write_comparison([tmp_path / str(number) for number in range(9)], page)
    (runs[1] / "metrics.jsonl").write_text("broken\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 1"):
        write_comparison(runs, page)
    assert not page.exists()
    monkeypatch.chdir(tmp_path)
    assert write_comparison([runs[0], write_run(tmp_path / "three")]) == Path("comparison.html")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_browser_switches_the_axis_of_every_curve(
    tmp_path: Path, width: int, runs: tuple[Path, Path], look: Callable[..., dict[str, Any]]
) -> None:
    for number, axis in enumerate(("step", "tokens", "time")):
        page = write_comparison(runs, tmp_path / f"{number}.html")
        outcome = look(page, width=width, first=f'document.querySelector("[for=by-{axis}]").click();')
        assert outcome["requests"] == []
        assert outcome["overflow"] <= 0
        assert len(outcome["seen"]) == 7
        assert all(chart["tip"].startswith(f"{axis} ") for chart in outcome["seen"])
        assert "one" in outcome["seen"][0]["tip"]
        assert "two" in outcome["seen"][0]["tip"]
