"""`trine rotate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rotate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="An unquantized Hugging Face folder, or a run folder.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(metavar="N", help="Of the signs of the rotation.")] = 0,
) -> None:
    """Rotate a model so that no channel holds its outliers: the same model, which loses less by quantizing.

    It pays where one scale covers many numbers, such as w4a16 with --group-size channel. The weights of norms go into
    the layers behind them; a head that was tied to the embedding becomes one of its own.
    """
    import shlex

    from trine.engine.env import set_threads
    from trine.engine.log import format_bytes, say
    from trine.engine.model.checkpoint import resolve_checkpoint
    from trine.engine.quantize.rotate_run import rotate_checkpoint

    set_threads(0)
    done = rotate_checkpoint(resolve_checkpoint(checkpoint), out, seed=seed)
    print(
        f"{out}: rotated, {format_bytes(done.bytes_before)} to {format_bytes(done.bytes_after)}"
        f"{', head and embedding are no longer one' if done.untied else ''}"
    )
    say(f"quantize it: trine quantize {shlex.quote(str(out))} --scheme w4a16 --out DIR")
