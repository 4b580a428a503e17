"""Training that is killed at any moment, in the middle of saving too, and continued: equal to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--power-loss", "--seed", "1"]], ids=["killed", "power-lost"])
def test_runs_that_are_killed_equal_a_run_left_alone(options: list[str]) -> None:
    command = [sys.executable, "-m", "trine.benchmarks.kill_loop", "--kills", "20", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 20
    assert summary["equal"], done.stdout
    assert done.returncode == 0
    in_saving = [moment for case in summary["cases"] for moment in case["moments"] if "writing" in moment]
    assert len(in_saving) >= 5, in_saving
    assert {case["case"] for case in summary["cases"] if case["kills"]} == {case["case"] for case in summary["cases"]}


def test_the_watch_of_the_kill_loop_sees_every_step_of_a_save(tmp_path: Path) -> None:
    """In a process of its own: hooks of this kind stay for good."""
    program = """
import sys
from pathlib import Path
from trine.benchmarks.kill_loop import FileWatch, Moment
from trine.engine.train.durable import write_folder
seen = []
class Told(FileWatch):
    def _operation(self, what, path):
        seen.append(what)
watch = Told(Path(sys.argv[1]), Moment(), Path("note"), power_loss=False)
write_folder(Path(sys.argv[1]) / "step", lambda folder: (folder / "weights").write_text("w"))
print(",".join(seen))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "mkdir,open,flush,flush,rename,flush"


def test_power_loss_keeps_of_a_file_what_was_flushed(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from trine.benchmarks.kill_loop import FileWatch, Moment
folder = Path(sys.argv[1])
watch = FileWatch(folder, Moment(), folder.parent / "note", power_loss=True)
for name, flushed in (("log", "kept"), ("lost", "")):
    with (folder / name).open("w") as file:
        if flushed:
            file.write(flushed)
            file.flush()
            os.fsync(file.fileno())
        file.write(" and more")
watch.kill("now")
"""
    folder = tmp_path / "run"
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (folder / "log").read_text() == "kept"
    assert (folder / "lost").read_text() == ""
    assert (tmp_path / "note").read_text() == "now"
