"""`trine bench`: timed comparisons against other programs, as ratios measured in one run."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Timed comparisons against other programs, as ratios measured in one run.",
)


@app.callback()
def bench() -> None:
    """Timed comparisons against other programs, as ratios measured in one run."""


@app.command("train")
def bench_train(
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds; in each, every contestant runs once.")] = 7,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps per contestant and round.")] = 3,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences per step.")] = 8,
    seq_len: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.")] = 512,
    threads: Annotated[
        int, typer.Option(metavar="N", min=0, help="CPU threads of each contestant; 0 = all physical cores.")
    ] = 0,
    peers: Annotated[bool, typer.Option("--peers/--alone", help="Time the transformers Trainer too.")] = True,
) -> None:
    """Train a 34M-parameter Llama in bf16 against the transformers Trainer, in turns.

    Prints tokens per second, peak memory and the median ratio; the last line on stdout is one JSON object.
    """
    from trine.benchmarks.train import compare

    compare(rounds=rounds, steps=steps, batch_size=batch_size, seq_len=seq_len, threads=threads, peers=peers)
