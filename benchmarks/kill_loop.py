"""Kill training again and again, continue it each time, and compare with a run that was left alone.

    python -m trine.benchmarks.kill_loop --kills 100

For each case (`kill_recipes.py`) one run is left alone; others are killed with SIGKILL and continued with
`--resume auto` until they finish. A kill comes either before a random operation on a file of the run folder (opening,
flushing, renaming, removing: so in the middle of saving too), or after a random time. With `--power-loss` the part of
every file that was not flushed to the disk is cut off as well, as when the machine goes down; names in folders are
kept. In the end metrics, weights, their averages and optimizer state must be equal to the bit, and after no kill may
the newest complete checkpoint be older than before it.

The hooks live in the process that is killed, a fork of this one: production code knows nothing of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trine.benchmarks.kill_recipes import CASES, make_base, make_sources, recipes
from trine.engine.env import environment
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.run_folder import RunFolder, step_number
from trine.engine.train.step_folder import step_damage

KINDS = ("step", "eval", "sample")
TIMES = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "joules"}
PATIENCE_SECONDS = 300
_WATCHED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}


@dataclass
class Moment:
    """When a process is killed: before file operation number `operation` (from 1), or after `seconds`."""

    operation: int | None = None
    seconds: float | None = None


@dataclass
class CaseResult:
    """What became of one case. `moments` counts the kills by what they came before."""

    case: str
    kills: int = 0
    runs: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    equal: bool = True
    faults: list[str] = field(default_factory=list)


class FileWatch:
    """Sees every operation on files under `folder` that this process makes from Python, and may end it before one."""

    def __init__(self, folder: Path, moment: Moment, note: Path, *, power_loss: bool) -> None:
        self.folder = str(folder.resolve())
        self.moment = moment
        self.note = note
        self.power_loss = power_loss
        self.count = 0
        self._busy = False
        self._flushed = {entry.stat().st_ino: entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()}
        self._fsync = os.fsync
        os.fsync = self._watched_fsync  # this process lives for one run
        sys.addaudithook(self._hook)
        if moment.seconds is not None:
            timer = threading.Timer(moment.seconds, self.kill, args=("at a random time",))
            timer.daemon = True
            timer.start()

    def kill(self, what: str) -> None:
        """Note the moment, lose what is not on the disk where asked to, and end this process."""
        self._busy = True
        self.note.write_text(what)
        if self.power_loss:
            for path in Path(self.folder).rglob("*"):
                if path.is_file():
                    found = path.stat()
                    os.truncate(path, min(found.st_size, self._flushed.get(found.st_ino, 0)))
        os.kill(os.getpid(), signal.SIGKILL)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WATCHED or self._busy or not isinstance(arguments[0], str | Path):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self._operation(event.removeprefix("os."), os.fspath(arguments[0]))

    def _watched_fsync(self, fd: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        self._operation("flush", path)
        self._fsync(fd)
        found = os.fstat(fd)
        self._flushed[found.st_ino] = found.st_size

    def _operation(self, what: str, path: str) -> None:
        absolute = os.path.abspath(path)
        if self._busy or not absolute.startswith(self.folder):
            return
        self.count += 1
        if self.count == self.moment.operation:
            self.kill(f"before {what} of {_kind_of(absolute, self.folder)}")


def _kind_of(path: str, folder: str) -> str:
    """What a path under the run folder is, without the number of the step."""
    parts = Path(path).relative_to(folder).parts
    if not parts:
        return "the run folder"
    top = "step-N" + parts[0].partition("step-")[2][8:] if "step-" in parts[0] else parts[0]
    top = (".writing-old-" if ".writing-old-" in parts[0] else ".writing-") + top if parts[0][0] == "." else top
    top = top.replace(".writing-.writing-", ".writing-")
    return "/".join([top, *parts[1:]])


def attempt(recipe: Recipe, moment: Moment, folder: Path, *, power_loss: bool) -> tuple[str, str]:
    """Run or continue a recipe in a process of its own, killed at `moment`.

    Returns ("finished", number of file operations), ("killed", before what) or ("failed", its output).
    """
    note, output = folder / "moment.txt", folder / "output.txt"
    note.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(PATIENCE_SECONDS)  # a process that hangs is a fault too
        with output.open("w") as file, redirect_stderr(file):
            try:
                watch = FileWatch(recipe.run.dir, moment, note, power_loss=power_loss)
                train(recipe)
                watch.moment = Moment()
                note.write_text(str(watch.count))
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=file, flush=True)
            finally:
                file.flush()
                os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and note.exists():
        return "killed", note.read_text()
    if status == 0:
        return "finished", note.read_text()
    return "failed", output.read_text()[-2000:]


def difference(alone: Path, other: Path) -> str | None:
    """The first thing in which two finished runs differ, or None."""
    if computed(alone) != computed(other):
        return "metrics.jsonl"
    last = (alone / "latest").read_text().strip()
    if (other / "latest").read_text().strip() != last:
        return "latest"
    if num_events(alone) != num_events(other):
        return "tensorboard"
    files = [
        sorted(str(path.relative_to(run)) for name in (last, "final") for path in (run / name).rglob("*.safetensors"))
        for run in (alone, other)
    ]
    if files[0] != files[1]:
        return "the files of weights"
    for file in files[0]:
        ours, theirs = load_file(alone / file), load_file(other / file)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return file
    return None


def num_events(run: Path) -> int:
    """Records in a run's event files: a length of 8 bytes, its checksum, the data, its checksum."""
    count = 0
    for path in (run / "tensorboard").glob("events*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            place += 16 + int.from_bytes(data[place : place + 8], "little")
            count += 1
    return count


def computed(run: Path) -> list[dict[str, Any]]:
    """Everything in a run's metrics that was computed, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["kind"] in KINDS]


def run_case(
    name: str, kills: int, folder: Path, make_recipe: Callable[..., Recipe], *, seed: int, power_loss: bool
) -> CaseResult:
    """Kill one case `kills` times, over as many runs as that takes."""
    result = CaseResult(name)
    choose = random.Random(f"{name} {seed}")
    folder.mkdir(parents=True)
    alone = make_recipe(CASES[name], folder / "alone")
    alone.run.dir.mkdir()
    started = time.perf_counter()
    outcome, told = attempt(alone, Moment(), folder, power_loss=False)
    duration = time.perf_counter() - started
    if outcome != "finished":
        raise RuntimeError(f"{name} alone: {outcome}: {told}")
    operations = int(told)
    while result.kills < kills:
        recipe = make_recipe(CASES[name], folder / f"killed-{result.runs:03d}")
        recipe.run.dir.mkdir()
        result.runs += 1
        outcome = "killed"
        while outcome == "killed":
            moment = Moment()
            if result.kills < kills:
                by_time = choose.random() < 0.3
                within = choose.randint(1, operations)
                moment = Moment(seconds=choose.uniform(0, duration)) if by_time else Moment(operation=within)
            before = newest_complete(recipe.run.dir)
            outcome, told = attempt(recipe, moment, folder, power_loss=power_loss)
            if newest_complete(recipe.run.dir) < before:
                result.faults.append(f"run {result.runs}: the checkpoint of step {before} was lost, killed {told}")
            if outcome == "killed":
                result.kills += 1
                result.moments[told] = result.moments.get(told, 0) + 1
        found = told if outcome == "failed" else difference(alone.run.dir, recipe.run.dir)
        if found is not None:
            result.equal = False
            result.faults.append(f"run {result.runs}: {found}")
    return result


def newest_complete(run: Path) -> int:
    """The step of the newest complete step folder, -1 where there is none."""
    return max((step_number(step) for step in RunFolder(run).steps() if step_damage(step) is None), default=-1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run all cases, print the table and one line of JSON; 0 where all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared by the cases")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--power-loss", action="store_true", help="cut off what was not flushed, too")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    facts = environment()  # before others move the checkout on
    results = []
    with tempfile.TemporaryDirectory() as name:
        sources, base = make_sources(Path(name)), make_base(Path(name))
        make_recipe = recipes(sources, base, steps=options.steps, threads=options.threads)
        for index, case in enumerate(CASES):
            share = options.kills // len(CASES) + (index < options.kills % len(CASES))
            result = run_case(
                case, share, Path(name) / case, make_recipe, seed=options.seed, power_loss=options.power_loss
            )
            results.append(result)
            print(f"{case}: {result.kills} kills in {result.runs} runs, equal to the bit: {result.equal}", flush=True)
            for fault in result.faults:
                print(f"  {fault}", flush=True)
    moments: Counter[str] = Counter()
    for result in results:
        moments.update(result.moments)
    for moment, count in moments.most_common():
        print(f"{count:4}  {moment}")
    summary = {
        "benchmark": "kill_loop",
        "kills": sum(result.kills for result in results),
        "runs": sum(result.runs for result in results),
        "equal": all(result.equal and not result.faults for result in results),
        "power_loss": options.power_loss,
        "steps": options.steps,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "cases": [asdict(result) for result in results],
        "environment": facts,
    }
    print(json.dumps(summary))
    return 0 if summary["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
