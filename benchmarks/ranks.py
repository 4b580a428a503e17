"""Training on one process with several threads against several processes with fewer, on the same cores.

    python -m trine.benchmarks.ranks [--cores N] [--rounds N] [--steps N] [--width N] [--layers N] [--batch-size N]

Contestants are numbers of ranks that divide the cores, and one rank on one core, in turns: each a `trine train` of its
own on the same recipe with the same pieces. Tokens per second are those of its log, the median over the steps but for
the first few. Beside the wall clock stands the processor time of a step over that of one rank on one core: it is what
ranks spend on each other, and waiting for a busy machine does not lengthen it, but for threads of one process, which
wait for each other by spinning. Start-up is left out by the difference of a long run and a short one. The last line on
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from trine.engine.data.prepare import prepare
from trine.engine.env import environment, load_average
from trine.engine.text.train_tokenizer import train_bpe

_WARM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens per second by the log, and processor seconds of a step."""

    tokens_per_second: float
    processor_seconds: float


def make_data(folder: Path, *, vocab_size: int) -> Path:
    """Random words of a small vocabulary, prepared."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(4000)]
    text = folder / "text.txt"
    text.write_text(" ".join(choose.choices(words, k=400_000)), encoding="utf-8")
    train_bpe([text.read_text()[:1_000_000]], vocab_size=vocab_size).save(folder / "tokenizer")
    prepare([text], tokenizer_dir=folder / "tokenizer", out=folder / "data", workers=1)
    return folder / "data"


def one_run(recipe: Path, run: Path, *, ranks: int, threads: int, steps: int) -> tuple[list[float], float]:
    """Tokens per second of each step, and processor seconds of the whole."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable, "-m", "trine.cli", "train", str(recipe), f"run.dir={run}", f"train.threads={threads}",
        f"train.steps={steps}", "--nproc", str(ranks),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = [line["seconds"] for line in lines if line["kind"] == "step"]
    taken = [later - sooner for sooner, later in pairwise(logged)]
    return taken[_WARM_STEPS:], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_turn(recipe: Path, folder: Path, *, ranks: int, threads: int, steps: int, tokens: int) -> Turn:
    """A long run and a short one."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        seconds, long = one_run(recipe, Path(name) / "long", ranks=ranks, threads=threads, steps=steps)
        _, short = one_run(recipe, Path(name) / "short", ranks=ranks, threads=threads, steps=_WARM_STEPS + 2)
    return Turn(tokens / statistics.median(seconds), (long - short) / (steps - _WARM_STEPS - 2))


def row(turns: dict[tuple[int, int], list[Turn]], place: tuple[int, int], *, beside: tuple[int, int]) -> dict[str, Any]:
    """The figures of a contestant, `speed` as a ratio to `beside`."""
    done = turns[place]
    speeds = [turn.tokens_per_second / other.tokens_per_second for turn, other in zip(done, turns[beside], strict=True)]
    costs = [turn.processor_seconds / one.processor_seconds for turn, one in zip(done, turns[1, 1], strict=True)]
    return {
        "ranks": place[0],
        "threads": place[1],
        "tokens_per_second": statistics.median(turn.tokens_per_second for turn in done),
        "speed": statistics.median(speeds),
        "speed_range": [min(speeds), max(speeds)],
        "processor_seconds_per_step": statistics.median(turn.processor_seconds for turn in done),
        "processor_time": statistics.median(costs),
        "processor_time_range": [min(costs), max(costs)],
    }


def main() -> None:
    """Print a row for each contestant, and all of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.ranks", description="Ranks against threads.")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    cores, tokens = options.cores, options.batch_size * 256
    places = [(1, 1), *((count, cores // count) for count in range(1, cores + 1) if cores % count == 0)]
    sizes = {"width": options.width, "num_layers": options.layers, "num_heads": options.width // 32}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stderr(io.StringIO()):
            data = make_data(folder, vocab_size=4096)
        table = {
            "model": {"family": "llama", **sizes},
            "data": {"path": str(data), "seq_len": 256},
            "train": {
                "steps": options.steps, "batch_size": options.batch_size, "device": "cpu",
                "micro_batch_size": options.batch_size // options.cores,
            },
            "schedule": {"kind": "constant"}, "eval": {"every": 0}, "checkpoint": {"every": 0}, "log": {"every": 1},
            "run": {"dir": str(folder / "run")},
        }  # fmt: skip
        recipe = folder / "recipe.toml"
        recipe.write_text(tomli_w.dumps(table), encoding="utf-8")
        turns: dict[tuple[int, int], list[Turn]] = {place: [] for place in dict.fromkeys(places)}
        for _ in range(options.rounds):
            for (ranks, threads), done in turns.items():
                turn = one_turn(recipe, folder, ranks=ranks, threads=threads, steps=options.steps, tokens=tokens)
                done.append(turn)
    rows = [row(turns, place, beside=(1, cores)) for place in turns]
    for one in rows:
        low, high = one["speed_range"]
        print(
            f"{one['ranks']:2d} ranks x {one['threads']} threads: {one['tokens_per_second']:8.0f} tokens/s, "
            f"{one['speed']:.2f} times one rank on {cores} threads ({low:.2f} to {high:.2f}); processor time "
            f"{one['processor_time']:.2f} times that of one rank on one thread"
        )
    load = load_average()[0]
    print(json.dumps({"rows": rows, "options": vars(options), "load": load, "environment": environment()}))


if __name__ == "__main__":
    main()
