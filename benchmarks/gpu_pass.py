"""The GPU pass: does everything that works on a CPU work, and give the same, on this machine's GPU? And how fast?

    PYTHONPATH=.typing python -m trine.benchmarks.gpu_pass [--device cuda] [--minutes N] [--bench] [--tune] ...
    ... --minutes 6; ... --bench --only bench --minutes 9        (fifteen minutes, where one command may take ten)

For a bare GPU machine: torch, triton, numpy, safetensors, tokenizers and pytest are enough, Trine need not be
installed (without typer, doctor is left out). First, beside each other: `trine doctor`; a small model trained on both
devices from the same weights and data, and generating on both; tests/gpu, in `--jobs` processes; the checks of what is
used only where it has passed them (kernels/tuned/verified.json): the kernels for Hopper GPUs, and parts merged by the
last program. Then alone on the GPU: with `--bench`, the most telling first, the benchmarks of generation (with
quantized weights too), of the kernels of serving, of training, and of the other kernels (the first and the third
against transformers, where it is installed), whose results go to benchmarks/results/; with `--tune` the search for
launch configurations.

Every stage is a process of its own with a time limit, so that a kernel that hangs or breaks the device costs its stage
and no other. With `--minutes` the whole ends in time, half of it for the benchmarks, and what was not run is said. Rows
are printed as stages end, and all as a table last; exit status 0 only if everything asked for ran and was good.
`--device cpu` compares the CPU with itself, which checks this script.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Its cases are those of the checks of the Hopper kernels, which are stages of their own.
HOPPER = ROOT / "tests/gpu/test_hopper.py"
NEEDED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pytest", "xdist")
# A stage that has less than this is not begun.
_LEAST_SECONDS = 20
# What a test of tests/gpu may take.
TEST_SECONDS = 180
# The share of `--minutes` that checks may take where benchmarks follow.
CHECKS_SHARE = 0.5
# Kernels whose times say most of serving; those of quantized products have 16 rows, of decoding, and 4096, of prompts.
SERVING = (
    "sample",
    "quantized_linear",
    "quantized_gated",
    "quantized_moe_mlp",
    "paged_attention",
    "quantize_rows",
    "kv_write",
)
# Weights that the benchmark of generation runs beside the model's own.
SCHEMES = ("w4a16", "w8a16", "fp8")
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Row:
    """One line of the table; `good` is None for what was not run."""

    check: str
    good: bool | None
    detail: str


@dataclass(frozen=True)
class Stage:
    """A program with a time limit, and how its output becomes rows. `show`: print all of its output.

    `settings` go to a program that keeps its time by itself: it gets them as JSON, with the minutes it has.
    """

    name: str
    command: list[str]
    minutes: float
    read: Callable[[str, str], list[Row]] | None = None
    show: bool = False
    settings: dict[str, object] | None = None


class Budget:
    """Seconds left of the whole pass."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def seconds(self, stage: Stage) -> float:
        """What a stage may take now."""
        return min(60 * stage.minutes, self.end - time.monotonic())


def main() -> int:
    """Parse the command line, run every stage, print the table; returns the exit status."""
    options = _parse()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu_pass: not installed here: {', '.join(missing)}; install them and run again", file=sys.stderr)
        return 1

    from trine.engine.env import choose_device
    from trine.engine.errors import UsageError

    try:
        device = str(choose_device(options.device))
    except UsageError as error:
        print(f"gpu_pass: {error}", file=sys.stderr)
        return error.exit_status
    logs = Path(options.logs or tempfile.mkdtemp(prefix="gpu-pass-"))
    logs.mkdir(parents=True, exist_ok=True)
    together, alone = (
        [stage for stage in group if not options.only or options.only in stage.name]
        for group in _stages(device, options)
    )
    budget, checks = Budget(options.minutes), Budget(options.minutes * (CHECKS_SHARE if alone else 1))
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        rows = [row for found in pool.map(lambda stage: run(stage, checks, logs), together) for row in found]
    rows += [row for stage in alone for row in run(stage, budget, logs)]
    print("\n".join([f"\nlogs: {logs}", *map(_line, rows)]))
    return 0 if rows and all(row.good for row in rows) else 1


def _line(row: Row) -> str:
    return f"{ {True: 'ok  ', False: 'FAIL', None: '----'}[row.good] }  {row.check:<34}  {row.detail}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_pass", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to check this script (default cuda)")
    parser.add_argument("--steps", type=int, default=50, help="training steps on each device (default 50)")
    parser.add_argument("--minutes", type=float, default=0, help="end within so many minutes (default: no limit)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only stages whose name contains TEXT")
    jobs = max(1, min(14, (os.cpu_count() or 1) - 1))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"tests at a time; they share the GPU (default {jobs})")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only tests that match, as pytest's -k")
    parser.add_argument("--operations", default="", metavar="A,B", help="of --bench and --tune (default: all)")
    parser.add_argument("--bench", action="store_true", help="time the kernels and keep the results")
    parser.add_argument("--quick", action="store_true", help="bench and tune one shape per operation")
    parser.add_argument("--tune", action="store_true", help="search launch configurations for this GPU")
    parser.add_argument("--results", default=str(ROOT / "benchmarks/results"), metavar="DIR", help="of --bench")
    parser.add_argument("--logs", default="", metavar="DIR", help="output of every stage (default: a new folder)")
    return parser.parse_args()


def _stages(device: str, options: argparse.Namespace) -> tuple[list[Stage], list[Stage]]:
    """What can run beside each other, and what needs the GPU alone."""
    module = [sys.executable, "-m"]
    compare = [*module, "trine.benchmarks.gpu_compare", device, str(options.steps)]
    together = [Stage("training and generation", compare, 10, _compared)]
    if importlib.util.find_spec("typer") is None:
        print("trine doctor is left out: typer is not installed here")
    else:
        together.insert(0, Stage("trine doctor", [*module, "trine.cli", "doctor", "--device", device], 3, show=True))
    together.append(Stage("tests/gpu", _pytest(options), 30, _tested))
    if _is_hopper(device):
        for room in ("attention", "quantized"):
            check = [*module, f"trine.kernels.{room}.hopper_check", "--verify"]
            together.append(Stage(f"hopper {room} check", check, 10, show=True))
    if _is_nvidia(device):
        merging = [*module, "trine.kernels.last_program_check", "--verify"]
        together.append(Stage("merging by the last program", merging, 5, show=True))
    alone = []
    kernels = [*module, "trine.benchmarks.kernels"]
    operations = [name for name in options.operations.split(",") if name]
    quick = options.quick or device == "cpu"
    settings: dict[str, object] = {"device": device, "quick": quick, "operations": operations}
    if options.bench:
        stem = f"{_gpu_name(device).lower().replace(' ', '-')}-{datetime.now(UTC):%Y-%m-%d}"
        generating, training = _end_to_end(device, quick=quick)
        groups = [("bench kernels", "kernels", 30.0, operations)]
        if not operations:
            groups = [("bench kernels of serving", "kernels-serving", 5, [*SERVING])]
            groups += [("bench other kernels", "kernels", 30, _other_kernels())]
        benches = []
        for name, file, minutes, some in groups:
            fields = {**settings, "operations": some, "out": str(Path(options.results) / f"{file}-{stem}.json")}
            benches.append(Stage(name, kernels, minutes, _benched, show=True, settings=fields))
        alone += [*generating[:1], *benches[:1], *training[:1], *generating[1:], *training[1:], *benches[1:]]
    if options.tune:
        alone.append(Stage("tune kernels", kernels, 120, show=True, settings={**settings, "tune": True}))
    return together, alone


def _other_kernels() -> list[str]:
    from trine.benchmarks.kernel_problem import all_cases

    return [name for name in dict.fromkeys(case.operation for case in all_cases()) if name not in SERVING]


def _end_to_end(device: str, *, quick: bool) -> tuple[list[Stage], list[Stage]]:
    """Generating and training, at a size where the GPU counts and at one where the host does; on a CPU hardly any."""
    sizes = [("1B", 8, 2048), ("34M", 8, 512)][1 if quick else 0 :]
    peers = device != "cpu" and importlib.util.find_spec("transformers") is not None
    steps, rounds, streams, tokens = (5, 3, 16, 64) if device != "cpu" else (1, 1, 2, 4)
    common = {"threads": 0, "device": device, "peers": peers}
    stages: dict[str, list[Stage]] = {"generate": [], "train": []}
    for size, batch, length in sizes if device != "cpu" else [("34M", 1, 64)]:
        train = {"size": size, "batch_size": batch, "seq_len": length, "steps": steps, "turns": rounds}
        generate = {"size": size, "streams": streams, "prompt_tokens": 128, "new_tokens": tokens, "rounds": rounds}
        for name, fields in (("generate", {**generate, "schemes": SCHEMES}), ("train", train)):
            command = [sys.executable, "-m", f"trine.benchmarks.{name}", json.dumps({**fields, **common})]
            stages[name].append(Stage(f"bench {name} {size}", command, 4, _raced, show=True))
    return stages["generate"], stages["train"]


def _pytest(options: argparse.Namespace) -> list[str]:
    """The command for tests/gpu: its processes are replaced when a test breaks the device for them, or hangs."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "xdist.plugin"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # Its other method waits for the call that hangs.
        command += ["-p", "pytest_timeout", "--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    if options.tests:
        command += ["-k", options.tests]
    # Each process begins with a run of neighbours, which share compiled kernels.
    command += ["-n", str(options.jobs), "--dist", "worksteal", "--max-worker-restart", "1000"]
    # The checks of the Hopper kernels are stages of their own.
    return [*command, "--ignore", str(HOPPER.relative_to(ROOT)), "tests/gpu"]


def _is_nvidia(device: str) -> bool:
    import torch

    return device != "cpu" and torch.version.hip is None


def _is_hopper(device: str) -> bool:
    import torch

    return _is_nvidia(device) and torch.cuda.get_device_capability(device) == (9, 0)


def _gpu_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def run(stage: Stage, budget: Budget, logs: Path) -> list[Row]:
    """Run a stage; its rows, with one for the program itself first."""
    limit = budget.seconds(stage)
    if limit < _LEAST_SECONDS:
        return [Row(stage.name, None, "not run: out of time")]
    log = logs / (re.sub(r"[^\w.]+", "-", stage.name) + ".log")
    command = list(stage.command)
    if stage.settings is not None:
        # It begins no case after nine tenths of its time, so that it can end by itself.
        command.append(json.dumps({**stage.settings, "minutes": 0.9 * limit / 60}))
    begin = time.monotonic()
    status = _call(command, log, limit)
    seconds = time.monotonic() - begin
    output = log.read_text(encoding="utf-8", errors="replace")
    lines = output.splitlines()
    shown = lines if stage.show else [] if status == 0 else lines[-_SHOWN_LINES:]
    rows = [] if stage.read is None else stage.read(stage.name, output)
    if status is None:
        rows.insert(0, Row(stage.name, False, f"stopped after {seconds:.0f} s"))
    elif status != 0 or not rows:
        rows.insert(0, Row(stage.name, status == 0, f"exit status {status}, {seconds:.0f} s"))
    print("\n".join([f"== {stage.name}: {seconds:.0f} s", *shown, *map(_line, rows)]), flush=True)
    return rows


def _call(command: list[str], log: Path, limit: float) -> int | None:
    """The exit status, or None for a program that was stopped at the limit, with all that it started."""
    with log.open("wb") as file:
        # Other plugins of pytest on that machine are none of ours; and tests beside each other need no threads.
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        if "pytest" in command:
            environment["OMP_NUM_THREADS"] = "1"
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _compared(_: str, output: str) -> list[Row]:
    """Rows of the JSON list in the last line."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("["):
        return []
    return [Row(row["check"], row["good"], row["detail"]) for row in json.loads(lines[-1])]


def _tested(name: str, output: str) -> list[Row]:
    """Counts of each file, from the lines that pytest prints as tests end, and the names of failed tests."""
    found = re.findall(
        r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S+?\.py)::(.+?) *$", output, re.MULTILINE
    )
    rows = []
    for file in sorted({file for _, file, _ in found}):
        outcomes = {test: outcome for outcome, where, test in found if where == file if outcome != "PASSED"}
        outcomes = {test: "PASSED" for _, where, test in found if where == file} | outcomes
        counts = Counter(outcomes.values())
        failed = [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
        detail = ", ".join(f"{number} {outcome.lower()}" for outcome, number in sorted(counts.items()))
        rows += [Row(file, not failed, detail), *(Row(f"  {test}", False, "") for test in sorted(failed))]
    ended = re.search(r"^=+ (?!.*(?:test session|FAILURES|ERRORS|info|summary)).* in [\d.]+s.*$", output, re.MULTILINE)
    return rows if ended or not rows else [Row(name, False, "not all tests ended"), *rows]


def _benched(name: str, output: str) -> list[Row]:
    """How many passes were timed, what failed and what was not run."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return []
    result = json.loads(lines[-1])
    rows = [Row(name, True, f"{len(result['rows'])} passes timed")]
    for row in result["left_out"]:
        good = {"FAILED": False, "not run": None}.get(row["reason"].partition(":")[0], True)
        if not good:
            rows.append(Row(f"  {row['operation']} {row['shape']}", good, row["reason"]))
    return rows


def _raced(name: str, output: str) -> list[Row]:
    """Tokens per second, and the ratios to the others."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return []
    contestants = json.loads(lines[-1])["contestants"]
    speed = {which: row["tokens_per_second"] for which, row in contestants.items()}
    others = [f"{speed['trine'] / other:.2f} x {which}" for which, other in speed.items() if which != "trine"]
    return [Row(name, True, "; ".join([f"{speed['trine']:,.0f} tokens/s", *others]))]


if __name__ == "__main__":
    sys.exit(main())
