"""`trine import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A model of llama.cpp.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of what is stored as numbers: float32, float16 or bfloat16."),
    ] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write numbers for Q8_0 and Q4_0 too, which else stay codes.")
    ] = False,
) -> None:
    """Make a Hugging Face folder of a GGUF file, for every command that takes a checkpoint.

    Linear layers in Q8_0 and Q4_0 keep their codes and exact values (format compressed-tensors); other blocks become
    numbers. The tokenizer is rebuilt where the file says all that is needed.
    """
    from trine.engine.convert.gguf import import_gguf as run
    from trine.engine.env import set_threads
    from trine.engine.log import format_bytes, say

    set_threads(0)
    result = run(file, out, dtype=dtype, dequantize=dequantize)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    name = str(result.dtype).removeprefix("torch.")
    print(
        f"{out}: {result.architecture}, {format_bytes(result.num_bytes)}; of {kinds} tensors {result.codes} stay "
        f"codes, the others are {name}"
    )
    if not result.tokenizer:
        say(f"no tokenizer was written: {result.why_no_tokenizer}; copy that of the original model into {out}")
