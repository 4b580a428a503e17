"""`trine inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A Hugging Face folder, a run or step folder, a PEFT adapter, or a .gguf file."
        ),
    ],
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Of a training checkpoint, read every file and compare its checksum.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on one line.")] = False,
) -> int:
    """Show what is inside a checkpoint, without loading it, and what is wrong with it.

    Family, sizes, parameters, files, dtypes, quantization, tokenizer, chat templates, memory. Exit status 1 where a
    problem was found.
    """
    import dataclasses
    import json as json_format

    from trine.engine.inspect.look import inspect as look
    from trine.engine.inspect.show import lines

    found = look(checkpoint, checksums=checksums)
    if json:
        print(json_format.dumps(dataclasses.asdict(found)))
    else:
        print("\n".join(lines(found)))
    return 1 if found.problems else 0
