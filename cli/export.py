"""`trine export`: a checkpoint in another dtype and other files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import Checkpoint


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto (as stored), float32 (fp32), bfloat16 (bf16) or float16 (fp16).")
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of each file, as 5GB, 800MiB or bytes; exporting takes so much memory.")
    ] = "5GB",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write the numbers that the codes of a quantized checkpoint stand for.")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Write the averaged weights of a step folder (a run with ema.decay).")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder in another dtype, in files of another size.

    Takes folders, runs and their steps, and quantized folders. Config, names and layout come out as every version of
    transformers reads them; tokenizer and templates are copied. DIR appears when all of it is written.
    """
    from trine.engine.config import parse_bytes
    from trine.engine.convert.export import export as run
    from trine.engine.convert.target import dtype_name
    from trine.engine.env import set_threads
    from trine.engine.log import format_bytes, format_count
    from trine.engine.model.checkpoint import resolve_checkpoint

    set_threads(0)
    size = parse_bytes(max_shard_size, "--max-shard-size")
    result = run(resolve_checkpoint(checkpoint), out, dtype=dtype, max_shard_bytes=size, dequantize=dequantize, ema=ema)
    files = "1 file" if result.num_files == 1 else f"{result.num_files} files"
    kept = "its codes as they were" if result.dtype is None else f"in {dtype_name(result.dtype)}"
    print(
        f"{out}: {result.family}, {format_count(result.num_parameters)} parameters {kept}, "
        f"{format_bytes(result.num_bytes)} in {files}"
    )
