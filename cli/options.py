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
TextFiles = Annotated[list[Path], typer.Argument(metavar="FILE", help="Text files, folders of them, or .jsonl files.")]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Field of a .jsonl line that holds the text.")]
Suffixes = Annotated[
    list[str] | None, typer.Option("--suffix", metavar=".EXT", help="Take only such files of a folder (repeatable).")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out bad UTF-8, empty files and broken lines instead of stopping.")
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
