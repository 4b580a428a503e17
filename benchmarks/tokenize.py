"""How fast `trine data prepare` turns text into tokens, and how that grows with the number of workers.

    python -m trine.benchmarks.tokenize [--megabytes N] [--vocab-size N] [--rounds N] [FILE...]

The whole of `prepare` is timed: reading, encoding, writing, hashing. Contestants are numbers of workers, in turns, on
the same text (files named, or this machine's Python standard library). Beside the wall clock, which a busy machine
lengthens, stand two figures that it hardly touches: processor time for a megabyte, which would rise if workers stood in
each other's way, and the part of it that the reading and writing thread takes, which bounds how many workers it can
feed. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from trine.engine.data.prepare import prepare
from trine.engine.env import environment, load_average
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe


@dataclass(frozen=True, slots=True)
class Turn:
    """One preparation: seconds on the clock, of the processor, and of the calling thread."""

    wall: float
    processor: float
    caller: float


def one_turn(text: Path, tokenizer: Path, out: Path, workers: int) -> Turn:
    """Prepare `text` once into a new folder."""
    began = time.perf_counter(), time.process_time(), time.thread_time()
    with contextlib.redirect_stderr(io.StringIO()):
        prepare([text], tokenizer_dir=tokenizer, out=out, workers=workers)
    return Turn(time.perf_counter() - began[0], time.process_time() - began[1], time.thread_time() - began[2])


def numbers_of_workers() -> list[int]:
    """1, 2, 4, ... and all cores."""
    cores = len(os.sched_getaffinity(0))
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


def write_text(files: list[Path], target: Path, size: int) -> int:
    """The text of `files`, over and over, up to about `size` bytes; returns how many."""
    content = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    if not content:
        raise SystemExit("no text in the files given")
    with target.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            file.write(content[: size - file.tell()])
    return target.stat().st_size


def main() -> None:
    """Print a row for each number of workers, and all of them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m trine.benchmarks.tokenize", description="Tokenizing speed.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = options.files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_text(files, folder / "text.txt", options.megabytes * 1_000_000)
        tokenizer = train_bpe([(folder / "text.txt").read_text()[:2_000_000]], vocab_size=options.vocab_size)
        tokenizer.save(folder / "tokenizer")
        turns: dict[int, list[Turn]] = {workers: [] for workers in numbers_of_workers()}
        for number in range(options.rounds + 1):  # the first round warms up
            for workers, done in turns.items():
                turn = one_turn(folder / "text.txt", folder / "tokenizer", folder / f"{number}-{workers}", workers)
                done.extend([turn] if number else [])
        tokens = len(Tokenizer.load(folder / "tokenizer").encode((folder / "text.txt").read_text()[:1_000_000]))
    alone = statistics.median(turn.wall for turn in turns[1])
    for workers, done in turns.items():
        wall = statistics.median(turn.wall for turn in done)
        processor = statistics.median(turn.processor for turn in done)
        row = {
            "workers": workers,
            "bytes_per_second": size / wall,
            "bytes_per_second_per_worker": size / wall / workers,
            "scaling": alone / wall,
            "bytes_per_processor_second": size / processor,
            "caller_share": statistics.median(turn.caller / turn.processor for turn in done),
            "spread": (max(turn.wall for turn in done) - min(turn.wall for turn in done)) / wall,
        }
        rows.append(row)
        print(
            f"{workers:3d} workers: {row['bytes_per_second'] / 1e6:6.2f} MB/s, "
            f"{row['bytes_per_second_per_worker'] / 1e6:5.2f} a worker, {row['scaling']:5.2f} times one worker "
            f"(spread {row['spread']:.0%}); {row['bytes_per_processor_second'] / 1e6:5.2f} MB per second of processor, "
            f"{row['caller_share']:.1%} of it reading and writing"
        )
    load = load_average()[0]
    print(f"{size / 1e6:.1f} MB, {options.vocab_size} ids, {1e6 / tokens:.2f} characters a token, load {load:.1f}")
    print(json.dumps({"rows": rows, "megabytes": size / 1e6, "load": load, "environment": environment()}))


if __name__ == "__main__":
    main()
