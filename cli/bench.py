"""`trine bench`: timed comparisons against other programs, as ratios measured in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import Device, Dtype

Size = Annotated[str, typer.Option(metavar="SIZE", help="Parameters of the model, a Llama: 34M or 1B.")]

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
    size: Size = "34M",
    device: Device = "auto",
    peers: Annotated[bool, typer.Option("--peers/--alone", help="Time the transformers Trainer too.")] = True,
) -> None:
    """Train a Llama in bf16 against the transformers Trainer, in turns.

    Prints tokens per second, peak memory and the median ratio; the last line on stdout is one JSON object.
    """
    from trine.benchmarks.train import compare
    from trine.benchmarks.train_contestants import Settings

    settings = Settings(
        steps=steps,
        turns=rounds,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        size=size,
        device=device,
    )
    compare(settings, peers=peers)


@app.command("generate")
def bench_generate(
    streams: Annotated[int, typer.Option(metavar="N", min=1, help="Requests at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the longest prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens of each request.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds; in each, every contestant runs once.")] = 5,
    threads: Annotated[int, typer.Option(metavar="N", min=0, help="CPU threads; 0 = all physical cores.")] = 0,
    size: Size = "34M",
    device: Device = "auto",
    dtype: Dtype = "auto",
    peers: Annotated[bool, typer.Option("--peers/--alone", help="Time transformers too.")] = True,
) -> None:
    """Generate with the batching engine and with transformers: one by one, in a batch, continuously; in turns.

    Prints tokens per second and ratios; the last line on stdout is one JSON object.
    """
    from trine.benchmarks.generate import Settings, compare

    compare(
        Settings(
            streams=streams,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype=dtype,
            peers=peers,
            size=size,
        )
    )


@app.command("serve")
def bench_serve(
    streams: Annotated[int, typer.Option(metavar="N", min=1, help="Answers at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of the longest prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of each answer.")] = 128,
    prefix_tokens: Annotated[int, typer.Option(metavar="N", min=16, help="Tokens of a shared beginning.")] = 1024,
    prefix_rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Times to a first token, of each kind.")] = 7,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds; in each, every contestant has a turn.")] = 5,
    threads: Annotated[
        int, typer.Option(metavar="N", min=0, help="CPU threads of each contestant; 0 = all physical cores.")
    ] = 0,
    dtype: Dtype = "auto",
    peers: Annotated[bool, typer.Option("--peers/--alone", help="Time transformers too.")] = True,
) -> None:
    """Serve many streams at once over HTTP, against the engine alone and transformers; and time to a first token.

    The last line on stdout is one JSON object.
    """
    from trine.benchmarks.serve import Settings, compare

    compare(
        Settings(
            streams=streams,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            prefix_tokens=prefix_tokens,
            prefix_rounds=prefix_rounds,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            peers=peers,
        )
    )


@app.command("kernels")
def bench_kernels(
    operation: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An operation to time; all where none is named (repeatable)."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds; in each, every contestant has a turn.")] = 5,
    minutes: Annotated[
        float, typer.Option(metavar="X", min=0, help="Begin no case after so many minutes; 0 is no limit.")
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the JSON object here too, after every case.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape per operation and short turns.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search launch configurations on a GPU; writes kernels/tuned/<gpu>.json.")
    ] = False,
) -> None:
    """Time every kernel against the best peer present, and against a copy and a matrix product on the same device.

    The last line on stdout is one JSON object. Without a GPU the torch paths are timed, at small sizes.
    """
    from trine.benchmarks.kernels import Settings, run

    settings = Settings(
        operations=tuple(operation or ()),
        device=device,
        dtype=dtype,
        rounds=rounds,
        out=str(out or ""),
        tune=tune,
        quick=quick,
        minutes=minutes,
    )
    raise typer.Exit(run(settings))
