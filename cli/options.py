"""Arguments and options that several commands share, so that they are named and explained alike.

In help texts N is an integer and X a number; a default that depends on something else says on what.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder, or a run folder (its final/ or latest step)."),
]
TextFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE", help="Text, .jsonl or .parquet files (also .gz, .bz2, .xz, .zst), folders of them, or URLs."
    ),
]
TextField = Annotated[
    str,
    typer.Option(
        "--text-field",
        "--text-column",
        metavar="NAME",
        help="Field of a .jsonl line, or column of a .parquet file, that holds the text.",
    ),
]
Suffixes = Annotated[
    list[str] | None, typer.Option("--suffix", metavar=".EXT", help="Take only such files of a folder (repeatable).")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out bad UTF-8, empty files and broken lines instead of stopping.")
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Temperature = Annotated[
    float, typer.Option(metavar="X", help="0 takes the likeliest token; 1 is the model's distribution.")
]
TopK = Annotated[int, typer.Option(metavar="N", help="Sample among the N likeliest tokens; 0 takes all of them.")]
TopP = Annotated[
    float, typer.Option(metavar="X", help="Sample among the likeliest tokens that reach this probability.")
]
MinP = Annotated[float, typer.Option(metavar="X", help="Leave out tokens below this fraction of the likeliest.")]
CalibrationSamples = Annotated[
    int | None, typer.Option(metavar="N", help="Samples to take of it.", show_default="up to 128, or 1024 pairs")
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens of a sample, held out or not; longer sources and targets are cut.",
        show_default="512, or the context",
    ),
]
SourceField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of encoder-decoders: field of a .jsonl line with the source.", show_default="source"
    ),
]
TargetField = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="And the one with its target.", show_default="target"),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory to keep to beside Python and torch, such as 2GiB.", show_default="none"),
]
Evaluation = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval",
        metavar="FILE...",
        help="Text to measure on, before and after.",
        show_default="a part of the calibration data that is held out",
    ),
]
ResumeLayers = Annotated[
    bool, typer.Option("--resume", help="Go on behind the layers that an interrupted run finished.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=DIR", help="A LoRA adapter in PEFT's layout (repeatable)."),
]
BulkFile = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A text a line, .jsonl or .parquet (also .gz, .bz2, .xz, .zst), or a URL."),
]
BulkField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Field of a .jsonl line, or column of a .parquet file, with the text.", show_default="text"
    ),
]
BatchTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens computed together.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long, instead of refusing them.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew where an unfinished run lies.")]
Draft = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT", help="A small model of the same vocabulary that guesses tokens.", show_default="none"
    ),
]
Speculate = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Guess so many tokens a step while few are under way, by --draft or by what repeats; 0 is off.",
        show_default="4 with --draft, else 0",
    ),
]


def guesses(speculate: int | None, draft: Path | None) -> int:
    """The number of --speculate. Raises `UsageError` for a draft model that is to guess nothing."""
    from trine.engine.errors import UsageError

    if draft is not None and speculate == 0:
        raise UsageError(f"--draft {draft} with --speculate 0 guesses nothing; leave out the one or the other")
    return (0 if draft is None else 4) if speculate is None else speculate


def names_and_folders(given: list[str] | None) -> tuple[tuple[str, str], ...]:
    """What --adapter says. Raises `UsageError` where one is not NAME=DIR, or two have one name."""
    from trine.engine.errors import UsageError

    found: dict[str, str] = {}
    for each in given or ():
        name, sign, folder = each.partition("=")
        if not name or not sign or not folder:
            raise UsageError(f"--adapter {each!r} is not NAME=DIR; give a name and the folder of a PEFT adapter")
        if name in found:
            raise UsageError(f"--adapter names {name!r} twice; give each adapter a name of its own")
        found[name] = folder
    return tuple(found.items())
