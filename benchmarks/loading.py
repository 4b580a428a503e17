"""How long a checkpoint takes to load, against reading the bytes of its weights twice.

    python -m trine.benchmarks.loading [--rounds N] [--threads N] DIR...

Files are read into new memory one after the other, as one object each, from the cache of the operating system: a first
round, which fills it, does not count. Loading is what every command does, so codes stay codes. Both in turns, in
seconds of the processor with one thread (others may use the machine), on the clock with more. The last line on stdout
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from trine.engine.env import environment
from trine.engine.generate.load import load_for_inference
from trine.engine.log import format_bytes


def clock() -> float:
    """Seconds: with one thread those of the processor."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def read_twice(files: list[Path]) -> float:
    """Seconds it takes to read all files into memory, twice."""
    began = clock()
    for file in files * 2:
        file.read_bytes()
    return clock() - began


def load(folder: Path) -> float:
    """Seconds until the model, and its small tokenizer, can be used."""
    began = clock()
    load_for_inference(folder, device="cpu")
    return clock() - began


def main() -> None:
    """Print a row for each folder, and all of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.loading", description="Loading checkpoints.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for folder in options.folders:
        files = sorted(folder.glob("*.safetensors"))
        turns = [(read_twice(files), load(folder)) for _ in range(options.rounds + 1)][1:]
        row = {
            "folder": folder.name,
            "bytes": sum(file.stat().st_size for file in files),
            "read_twice_seconds": round(statistics.median(read for read, _ in turns), 3),
            "load_seconds": round(statistics.median(loaded for _, loaded in turns), 3),
            "ratio": round(statistics.median(loaded / read for read, loaded in turns), 2),
            "ratio_min": round(min(loaded / read for read, loaded in turns), 2),
            "ratio_max": round(max(loaded / read for read, loaded in turns), 2),
        }
        rows.append(row)
        print(
            f"{folder.name:20} {format_bytes(row['bytes']):>10}  read twice {row['read_twice_seconds']:.3f} s, "
            f"loaded {row['load_seconds']:.3f} s, {row['ratio']:.2f} of it ({row['ratio_min']} to {row['ratio_max']})"
        )
    print(json.dumps({"threads": options.threads, "rows": rows, "environment": environment()}))


if __name__ == "__main__":
    main()
