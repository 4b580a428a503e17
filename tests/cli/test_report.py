"""`trine report` as a command: what it prints, where it writes, and its exit status on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def trine_report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = "from trine.cli.main import main; main()"
    command = [sys.executable, "-c", program, "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text("[train]\nsteps = 2\n")
    records = [{"kind": "start", "step": 0}, {"kind": "step", "step": 1, "loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_report_is_written_where_asked_and_its_path_printed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"
    done = trine_report(run, "--out", page)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{page}\n", "")
    assert page.read_text().startswith("<!doctype html>")
    assert trine_report(run).stdout == f"{run / 'report.html'}\n"


def test_bad_input_is_one_line_and_a_status(tmp_path: Path) -> None:
    missing = trine_report(tmp_path / "nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.count("\n") == 1
    assert "nowhere" in missing.stderr
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("not json\n")
    damaged = trine_report(run)
    assert (damaged.returncode, damaged.stdout) == (1, "")
    assert "line 1" in damaged.stderr
    unwritable = trine_report(write_run(tmp_path / "other"), "--out", tmp_path / "no" / "such" / "page.html")
    assert unwritable.returncode == 1
    assert unwritable.stderr.count("\n") == 1
