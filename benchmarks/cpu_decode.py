"""Decoding on a CPU beside llama.cpp (one request) and transformers (several): tokens per second, in turns.

    python -m trine.benchmarks.cpu_decode [--llama PYTHON] [--models 34M,350M] [--weights bf16,int8,int4]
        [--rows 1,4,16,64] [--threads N] [--rounds N] [--real-time]
    python -m trine.benchmarks.cpu_decode --weights w4a16,w8a16,w8a8,fp8,fp8-block --rows 1 --threads 1
    python -m trine.benchmarks.cpu_decode --ways --weights bf16,int8,int4,w4a16,w8a16,w8a8,fp8,fp8-block --rows 2,4,8,16

Every contestant decodes greedily from a context of 128 tokens with random weights of Llama's shape; a step includes the
embedding, the output projection and the choice of the next token. llama.cpp runs in a process of the Python that is
named (with llama-cpp-python and gguf), with bf16, q8_0 and q4_0 weights; transformers runs bf16. Weights as quantized
checkpoints hold them (w4a16, w8a16, w8a8, fp8, fp8-block) run beside our own bf16 ones instead. With `--ways` our two
ways to compute a step run beside each other, all in compiled loops or with the products of more rows: `STEP_ROWS` of
`kernels/cpu/measured.py`. In every round each contestant takes a turn of 24 steps, in another order than the round
before. Figures are medians over all steps; the ratios are medians over rounds of the ratio of the two turns' medians,
so that a machine whose speed drifts, or that others use, slows both; with one thread they are in its time on a core.
`--real-time` (Linux, as root) gives all threads of all contestants real-time priority during the turns, for a machine
that others use: threads that wait for each other by spinning lose most of their time there.
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trine.benchmarks.cpu_decode_models import CHECKPOINTS, CONTEXT, SHAPES, STEPS, Shape, Transformers, Trine
from trine.engine.env import environment

Turn = Callable[[], list[float]]
LLAMA_WEIGHTS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


@contextmanager
def llama(python: str, shape: Shape, weights: str, threads: int) -> Iterator[tuple[Turn, int, dict[str, str]]]:
    """llama.cpp in its process: its turn, its id, and what it says of itself. RuntimeError if it ends."""
    sizes = (shape.width, shape.feed, shape.num_layers, shape.heads, shape.vocabulary)
    script = str(Path(__file__).with_name("cpu_decode_llama.py"))
    # -P: else modules beside the script would hide those of the standard library with the same name.
    command = [python, "-P", script, shape.name, *map(str, sizes), weights, *map(str, (threads, CONTEXT, STEPS))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("pipes to the process of llama.cpp were not made")
        source, sink = process.stdout, process.stdin

        def answer() -> Any:
            line = source.readline()
            if not line:
                raise RuntimeError(f"{python} ended; it needs llama-cpp-python, gguf and numpy (see above)")
            return json.loads(line)

        def turn() -> list[float]:
            sink.write("\n")
            sink.flush()
            return list(answer())

        yield turn, process.pid, answer()
        sink.close()


def set_real_time(process: int, on: bool) -> None:
    """Real-time priority, or none, for all threads of a process."""
    policy, priority = (os.SCHED_RR, 1) if on else (os.SCHED_OTHER, 0)
    for thread in os.listdir(f"/proc/{process}/task"):
        os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


@contextmanager
def real_time(processes: Sequence[int]) -> Iterator[None]:
    """Real-time priority inside."""
    try:
        for process in processes:
            set_real_time(process, on=True)
        yield
    finally:
        for process in processes:
            set_real_time(process, on=False)


def race(turns: dict[str, Turn], rounds: int, processes: Sequence[int] = ()) -> dict[str, list[list[float]]]:
    """Seconds of the steps of every turn; the first round does not count. `processes`: run turns in real time."""
    names = list(turns)
    seconds: dict[str, list[list[float]]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        for name in names if i % 2 else reversed(names):
            with real_time(processes):
                taken = turns[name]()
            if i:
                seconds[name].append(taken)
    return seconds


def report(shape: Shape, rows: int, threads: int, seconds: dict[str, list[list[float]]], base: str) -> dict[str, Any]:
    """Tokens per second of all, and our median ratio to the base."""
    speeds = {name: rows / statistics.median(s for turn in turns for s in turn) for name, turns in seconds.items()}
    fastest = {name: rows / min(s for turn in turns for s in turn) for name, turns in seconds.items()}
    result: dict[str, Any] = {"model": shape.name, "rows": rows, "threads": threads}
    result["tokens_per_second"] = {name: round(speed, 1) for name, speed in speeds.items()}
    result["fastest_tokens_per_second"] = {name: round(speed, 1) for name, speed in fastest.items()}
    if base in seconds:
        result["ratio_to"] = base
        result["ratios"] = {
            name: round(
                statistics.median(
                    statistics.median(peer) / statistics.median(own)
                    for peer, own in zip(seconds[base], turns, strict=True)
                ),
                2,
            )
            for name, turns in seconds.items()
            if name != base
        }
    return result


def compare(shape: Shape, rows: int, weights: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One kind of weights beside its peer: llama.cpp for one row, transformers for more; bf16 for checkpoints'."""
    if options.ways:
        ways = {way: Trine(shape, weights, rows, most).turn for way, most in (("loops", rows), ("products", 0))}
        yield {"weights": weights, **report(shape, rows, options.threads, race(ways, options.rounds), "products")}
        return
    ours = Trine(shape, weights, rows)
    turns: dict[str, Turn] = {f"trine {weights}": ours.turn}
    processes = [os.getpid()] if options.real_time else []
    if weights in CHECKPOINTS:
        turns["trine bf16"] = Trine(shape, "bf16", rows).turn
        result = report(shape, rows, options.threads, race(turns, options.rounds, processes), "trine bf16")
        yield {**result, "weights_bytes": ours.bytes}
    elif rows > 1:
        if find_spec("transformers") is not None:
            turns["transformers bf16"] = Transformers(shape, rows).turn
        seconds = race(turns, options.rounds, processes)
        yield report(shape, rows, options.threads, seconds, "transformers bf16")
    elif options.llama is None:
        yield report(shape, rows, options.threads, race(turns, options.rounds, processes), "")
    else:
        base = f"llama.cpp {LLAMA_WEIGHTS[weights]}"
        with llama(options.llama, shape, LLAMA_WEIGHTS[weights], options.threads) as (turn, process, about):
            turns[base] = turn
            seconds = race(turns, options.rounds, [*processes, process] if processes else ())
            result = report(shape, rows, options.threads, seconds, base)
        yield {**result, "llama_cpp": about, "weights_bytes": ours.bytes}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; unknown models or weights are refused by name."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.cpu_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--llama", metavar="PYTHON", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--models", default=",".join(shape.name for shape in SHAPES))
    parser.add_argument("--weights", default=",".join(LLAMA_WEIGHTS))
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", action="store_true", help="our loops beside our products instead of others")
    parser.add_argument("--real-time", action="store_true", help="real-time priority during the turns")
    options = parser.parse_args(arguments)
    for name, known in (("models", [shape.name for shape in SHAPES]), ("weights", [*LLAMA_WEIGHTS, *CHECKPOINTS])):
        chosen = getattr(options, name).split(",")
        if unknown := [x for x in chosen if x not in known]:
            parser.error(f"--{name} has {', '.join(unknown)}; known are {', '.join(known)}")
        setattr(options, name, chosen)
    try:
        options.rows = [int(rows) for rows in options.rows.split(",")]
    except ValueError:
        parser.error(f"--rows is {options.rows!r}; give whole numbers with commas between")
    if min(options.threads, options.rounds, *options.rows) < 1:
        parser.error("--threads, --rounds and --rows must be 1 or more")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure, print a line for every comparison, and all as JSON."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    with torch.inference_mode():
        for shape in (shape for shape in SHAPES if shape.name in options.models):
            for rows in options.rows:
                for weights in options.weights:
                    for result in compare(shape, rows, weights, options):
                        print(json.dumps(result), flush=True)
                        results.append(result)
    about = {"context": CONTEXT, "steps": STEPS, "rounds": options.rounds, "real_time": options.real_time}
    print(json.dumps({"environment": environment(), **about, "results": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
