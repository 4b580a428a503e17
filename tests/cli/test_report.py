"""`trine report` as a command: what it prints, where it writes, and its exit status on bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Trine = Callable[..., tuple[int, str, str]]


def write_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text("[train]\nsteps = 2\n")
    records = [{"kind": "start", "step": 0}, {"kind": "step", "step": 1, "loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_report_is_written_where_asked_and_its_path_printed(trine: Trine, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"
    assert trine("report", run, "--out", page) == (0, f"{page}\n", "")
    assert page.read_text().startswith("<!doctype html>")
    assert trine("report", run) == (0, f"{run / 'report.html'}\n", "")


def test_several_runs_are_written_side_by_side(trine: Trine, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    page = tmp_path / "page.html"
    assert trine("report", *runs, "--out", page) == (0, f"{page}\n", "")
    assert "2 runs compared" in page.read_text()
    status, shown, complaints = trine("report", runs[0], tmp_path / "nowhere", "--out", page)
    assert (status, shown, complaints.count("\n")) == (2, "", 1)


def test_missing_run_is_wrong_usage(trine: Trine, tmp_path: Path) -> None:
    status, shown, complaints = trine("report", tmp_path / "nowhere")
    assert (status, shown) == (2, "")
    assert complaints.count("\n") == 1
    assert "nowhere" in complaints


def test_damaged_run_is_a_failure_that_names_the_line(trine: Trine, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("not json\n")
    status, shown, complaints = trine("report", run)
    assert (status, shown) == (1, "")
    assert complaints.count("\n") == 1
    assert "line 1" in complaints


def test_page_that_cannot_be_written_is_a_failure(trine: Trine, tmp_path: Path) -> None:
    status, _, complaints = trine(
        "report", write_run(tmp_path / "run"), "--out", tmp_path / "no" / "such" / "page.html"
    )
    assert status == 1
    assert complaints.count("\n") == 1
