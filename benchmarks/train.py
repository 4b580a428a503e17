"""Training speed against the transformers Trainer, in turns: `trine bench train`.

    python -m trine.benchmarks.train '{"size": "1B", ..., "peers": true}'        (the fields of `Settings`)

Every contestant is a process of its own that builds the same Llama shape, warms up and then waits. In each round each
of them runs a few optimizer steps while the others sleep, so that a machine whose speed drifts slows all alike; the
order within a round alternates. The figure is the median over rounds of the ratio of tokens per second.

Both train in bfloat16 with float32 master weights and fused AdamW on the same batch shape: transformers through its
`Trainer` with `bf16=True` (autocast), Trine through its own loop with `compute_dtype = "bfloat16"`. Peak memory is that
of the process; on a GPU, that of its tensors there.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from trine.benchmarks.train_contestants import Settings
from trine.engine.env import choose_device, environment, physical_cores
from trine.engine.log import format_bytes, say
from trine.engine.model.cost import count_parameters, flops_per_token
from trine.kernels.hardware import device_name

CONTESTANTS = ("trine", "transformers")


@dataclass(frozen=True)
class Turn:
    """What a contestant reports after one turn: tokens trained, seconds, peak memory of its process so far."""

    tokens: int
    seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained per second of wall time."""
        return self.tokens / self.seconds


class Contestant:
    """A contestant's process, spoken to in JSON lines over its standard input and output."""

    def __init__(self, name: str, settings: Settings) -> None:
        """Start the process and wait until it has warmed up."""
        self.name = name
        command = [sys.executable, "-m", "trine.benchmarks.train_contestants", name, json.dumps(asdict(settings))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def turn(self) -> Turn:
        """Let it run its steps once."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return Turn(**self._read())

    def close(self) -> None:
        """Ask it to end (it stops when its standard input closes) and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise RuntimeError(f"the {self.name} contestant ended with status {self.process.wait()}")


def compare(settings: Settings, *, peers: bool) -> None:
    """Run the comparison and print a table and one JSON line."""
    settings = replace(settings, threads=settings.threads or physical_cores())
    config, device, rounds = settings.model_config(), choose_device(settings.device), settings.turns
    batch_size, seq_len = settings.batch_size, settings.seq_len
    say(
        f"Llama of {count_parameters(config).total / 1e6:.1f}M parameters, bfloat16, {batch_size} x {seq_len} tokens, "
        f"on {device_name(device)}"
    )
    contestants = [Contestant(name, settings) for name in (CONTESTANTS if peers else CONTESTANTS[:1])]
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in contestants}
    for round_number in range(rounds):
        order = contestants if round_number % 2 == 0 else contestants[::-1]
        for contestant in order:
            turns[contestant.name].append(contestant.turn())
        shown = ", ".join(f"{name} {taken[-1].tokens_per_second:,.0f} tokens/s" for name, taken in turns.items())
        say(f"round {round_number + 1}/{rounds}: {shown}")
    for contestant in contestants:
        contestant.close()
    flops = flops_per_token(config, seq_len, training=True)
    rows = {name: _summary(taken, flops) for name, taken in turns.items()}
    result: dict[str, Any] = {"benchmark": "train", **asdict(settings), "contestants": rows}
    for name, row in rows.items():
        memory = format_bytes(row["peak_bytes"])
        speed = f"{row['tokens_per_second']:>9,.0f} tokens/s  {row['gflops'] / 1e3:.2f} TFLOP/s"
        print(f"{name:14}{speed}  {memory} peak")
    if peers:
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(*turns.values(), strict=True)]
        result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        print(f"ratio trine / transformers: median {result['ratio']['median']:.2f}")
    result["environment"] = environment(device)
    print(json.dumps(result))


def _summary(turns: list[Turn], flops_of_a_token: float) -> dict[str, float]:
    speed = statistics.median(turn.tokens_per_second for turn in turns)
    peak = max(turn.peak_bytes for turn in turns)
    return {"tokens_per_second": speed, "gflops": speed * flops_of_a_token / 1e9, "peak_bytes": peak}


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    compare(peers=fields.pop("peers"), settings=Settings(**fields))
