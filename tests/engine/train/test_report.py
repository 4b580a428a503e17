"""The report page: what it shows of a run in every state, and that a browser needs nothing else to show it."""

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
from trine.engine.train.charts import Line, decimate, draw, smooth
from trine.engine.train.metrics import MetricsFile
from trine.engine.train.report import save_loss_figure, write_report
from trine.engine.train.run_log import read_run

RECIPE = """
[model]
family = "llama"
width = 256
tie_embeddings = true

[data]
sources = [{ path = "shards/code", weight = 1.0 }]

[train]
steps = 600
"""


def start_record() -> dict[str, Any]:
    environment = {"hardware": {"cpu": "Some CPU", "memory_bytes": 2**34}, "torch": "2.13.0", "commit": None}
    return {"kind": "start", "step": 0, "time": 1.79e9, "parameters": 6_290_000, "environment": environment}


def step_record(step: int) -> dict[str, Any]:
    loss = 3 + 5 * math.exp(-step / 80) + 0.1 * math.sin(7.3 * step)
    return {
        "kind": "step",
        "step": step,
        "tokens": 4096 * step,
        "loss": loss,
        "lr": 3e-3 * (1 - step / 600),
        "muon_lr": 2e-2 * (1 - step / 600),
        "grad_norm": 0.8 + 0.3 * math.sin(step),
        "tokens_per_second": 9000 + 300 * math.sin(step / 9),
        "mfu": 0.3,
        "seconds": 0.45 * step,
        "memory_bytes": 1_200_000_000 + 1000 * step,
    }


def eval_record(step: int) -> dict[str, Any]:
    loss = 3.1 + 5 * math.exp(-step / 80)
    return {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 2.4, "tokens": 100_000, "seconds": 3.0}


def sample_record(step: int) -> dict[str, Any]:
    return {"kind": "sample", "step": step, "prompt": "def <main>(", "text": f"self):\n    return {step} & 1\n"}


def end_record(step: int, reason: str) -> dict[str, Any]:
    return {"kind": "end", "step": step, "reason": reason, "seconds": 0.45 * step, "tokens": 4096 * step,
            "peak_memory_bytes": 1_300_000_000}  # fmt: skip


def write_run(folder: Path, records: list[dict[str, Any]], recipe: str = RECIPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def finished_records(steps: int = 600) -> list[dict[str, Any]]:
    records = [start_record()]
    for step in range(1, steps + 1):
        records.append(step_record(step))
        if step % 100 == 0:
            records += [eval_record(step), sample_record(step)]
    return [*records, end_record(steps, "finished")]


class Page(HTMLParser):
    """The page's tags, the text outside style and script, and the chart readouts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.text += data

    @property
    def readouts(self) -> list[dict[str, Any]]:
        return [json.loads(attrs["data-readout"] or "") for _, attrs in self.tags if "data-readout" in attrs]

    @property
    def lines(self) -> set[str]:
        return {line["label"] for readout in self.readouts for line in readout["lines"]}


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def test_page_of_a_finished_run_shows_every_part(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", finished_records()))
    expected = {"training", "training, smoothed", "validation", "AdamW", "Muon", "gradient norm", "speed", "memory"}
    assert page.lines == expected
    last = eval_record(600)
    for shown in (
        "finished",
        "600",
        f"{last['loss']:.4f}",
        f"{last['bits_per_byte']:.4f}",
        "6.29M",
        "1.2 GiB",
    ):
        assert shown in page.text
    for shown in ("def <main>(", "return 600 & 1", "return 100 & 1"):  # samples, escaped in the source
        assert shown in page.text
    for shown in ("tie_embeddings", "sources[0].path", "shards/code", "hardware.cpu", "Some CPU", "16.0 GiB"):
        assert shown in page.text


def test_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", finished_records(20))).read_text()
    page = Page(text)
    references = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "xlink:href") if key in attrs]
    assert {reference for reference in references if not (reference or "").startswith("#")} == {"data:,"}
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_ids_are_unique_on_the_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", finished_records()))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert ids
    assert len(ids) == len(set(ids))


def test_run_in_progress_without_evaluations(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [start_record(), *map(step_record, range(1, 31))])
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 31, "lo')  # the trainer is writing this line
    page = page_of(folder)
    assert "in progress" in page.text
    assert "No evaluation has been made." in page.text
    assert "of 600 (5 %)" in page.text
    assert "validation" not in page.lines


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", [start_record()]))
    assert "No step has been logged yet." in page.text
    assert page.readouts == []


def test_run_of_one_step(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", [start_record(), step_record(1)]))
    assert all(len(line["points"]) == 1 for readout in page.readouts for line in readout["lines"])


def test_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    before = [start_record(), *map(step_record, range(1, 151)), eval_record(150), end_record(150, "interrupted")]
    killed = [{"kind": "resume", "step": 150}, *map(step_record, range(151, 231)), sample_record(230)]
    after = [{"kind": "resume", "step": 200}, *map(step_record, range(201, 251))]
    folder = write_run(tmp_path / "run", before)
    for step, records in ((150, killed), (200, after)):
        metrics = MetricsFile.resume(folder / "metrics.jsonl", step=step)
        for record in records:
            metrics.write(**record)
        metrics.close()
    log = read_run(folder)
    assert [record["step"] for record in log.steps] == list(range(1, 251))
    assert log.resumed_at == [150, 200]
    assert log.samples == []  # superseded by the resume at 200
    assert log.end is None
    assert "resumed at step 150, 200" in page_of(folder).text


def test_non_finite_loss_is_left_out_of_the_curves_and_named_in_the_state(tmp_path: Path) -> None:
    broken = {**step_record(3), "loss": math.nan, "grad_norm": math.inf, "mfu": None}
    records = [start_record(), step_record(1), step_record(2), broken, end_record(3, "non-finite")]
    page = page_of(write_run(tmp_path / "run", records))
    assert "non-finite" in page.text
    assert [len(line["points"]) for line in page.readouts[0]["lines"]] == [2, 2]


def test_missing_folder_recipe_or_metrics_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run folder at .*nowhere"):
        write_report(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=r"holds no metrics\.jsonl"):
        write_report(empty)
    folder = write_run(tmp_path / "run", [start_record()])
    (folder / "recipe.toml").unlink()
    with pytest.raises(DataError, match=r"holds no recipe\.toml"):
        write_report(folder)


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"step": 3}', '{"kind": "step"}', "\x00\x00"])
def test_damaged_log_names_the_line_and_writes_nothing(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run", [start_record(), step_record(1)])
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + line + "\n" + json.dumps(step_record(2)) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 3 is no record") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "recipe.toml"]


def test_damaged_recipe_is_one_clear_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [start_record()], recipe="[model\n")
    with pytest.raises(DataError, match=r"recipe\.toml is damaged"):
        write_report(folder)


def test_decimation_keeps_borders_and_spikes() -> None:
    xs = list(range(100_000))
    ys = [0.0] * 100_000
    ys[54_321], ys[77_777] = 9.0, -9.0
    kept_xs, kept_ys = decimate(xs, ys, 600)
    assert len(kept_xs) <= 600
    assert kept_xs == sorted(kept_xs)
    assert (kept_xs[0], kept_xs[-1]) == (0, 99_999)
    assert (max(kept_ys), min(kept_ys)) == (9.0, -9.0)


def test_smoothing_keeps_straight_lines() -> None:
    assert smooth([2.5] * 50) == pytest.approx([2.5] * 50)
    falling = [100.0 - step for step in range(100)]
    assert smooth(falling) == pytest.approx(falling)  # a straight line stays in its place: no lag


def test_drawing_twice_gives_the_same_bytes() -> None:
    line = Line(label="loss", xs=[1, 2, 3], ys=[3.0, 2.0, 1.5], role="loss")
    first, second = (draw([line], name="loss", size=(400, 200), x_range=(0, 3)) for _ in range(2))
    assert first == second
    assert "#01fe" not in first.svg  # every placeholder colour became a variable
    assert "var(--chart-loss)" in first.svg


def test_loss_figure_stands_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished_records())
    svg = save_loss_figure(run, tmp_path / "loss.svg").read_text()
    assert svg.startswith("<?xml")
    assert "prefers-color-scheme: dark" in svg
    used = set(re.findall(r"var\((--chart-\w+)\)", svg))
    assert {"--chart-loss", "--chart-validation"} <= used
    assert all(f"{name}: #" in svg for name in used)


# ---- in a browser


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_browser_shows_the_curves_without_a_complaint_or_a_request(
    tmp_path: Path, width: int, look: Callable[..., dict[str, Any]]
) -> None:
    outcome = look(write_report(write_run(tmp_path / "run", finished_records())), width=width)
    assert outcome["requests"] == []
    assert outcome["overflow"] <= 0
    assert len(outcome["seen"]) == 5  # of the loss chart's two drawings one is shown
    assert all(chart["lines"] >= 2 and chart["colours"] >= 2 and chart["width"] > 300 for chart in outcome["seen"])
    assert all(chart["tip"].startswith("step ") for chart in outcome["seen"])
    assert "validation" in outcome["seen"][0]["tip"]
