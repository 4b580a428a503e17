"""`trine export`: a checkpoint in another dtype and other files, or as one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import Checkpoint


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(metavar="PATH", help="The folder, or GGUF file, to write; it must not exist.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto (as stored), float32 (fp32), bfloat16 (bf16), float16 (fp16); GGUF: q8_0 too."
        ),
    ] = "auto",
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="hf: a folder. gguf: a file for llama.cpp (llama, qwen2, qwen3)."
        ),
    ] = "hf",
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of each file, as 5GB, 800MiB or bytes; exporting takes so much memory.",
            show_default="5GB",
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write the numbers that the codes of a quantized checkpoint stand for.")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Write the averaged weights of a step folder (a run with ema.decay).")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder in another dtype, in files of another size, or as a GGUF file.

    Takes folders, runs and their steps, and quantized folders. Config, names and layout come out as every version of
    transformers reads them; tokenizer and templates are copied. PATH appears when all of it is written.
    """
    from trine.engine.config import parse_bytes
    from trine.engine.convert.export import export as run
    from trine.engine.convert.target import dtype_name
    from trine.engine.env import set_threads
    from trine.engine.errors import UsageError
    from trine.engine.log import format_bytes, format_count
    from trine.engine.model.checkpoint import resolve_checkpoint

    set_threads(0)
    if form not in ("hf", "gguf"):
        raise UsageError(f"--format is {form!r}; it must be hf or gguf")
    if form == "gguf":
        if ema or max_shard_size is not None:
            option = "--ema" if ema else "--max-shard-size"
            raise UsageError(f"{option} does not belong to a GGUF file; export a folder first, or leave it out")
        _export_gguf(resolve_checkpoint(checkpoint), out, dtype=dtype, dequantize=dequantize)
        return
    size = parse_bytes(max_shard_size or "5GB", "--max-shard-size")
    result = run(resolve_checkpoint(checkpoint), out, dtype=dtype, max_shard_bytes=size, dequantize=dequantize, ema=ema)
    files = "1 file" if result.num_files == 1 else f"{result.num_files} files"
    kept = "its codes as they were" if result.dtype is None else f"in {dtype_name(result.dtype)}"
    print(
        f"{out}: {result.family}, {format_count(result.num_parameters)} parameters {kept}, "
        f"{format_bytes(result.num_bytes)} in {files}"
    )


def _export_gguf(checkpoint: Path, out: Path, *, dtype: str, dequantize: bool) -> None:
    from trine.engine.convert.gguf_writer import write_gguf
    from trine.engine.log import format_bytes, format_count, say

    result = write_gguf(checkpoint, out, dtype=dtype, dequantize=dequantize)
    print(
        f"{out}: {result.architecture}, {format_count(result.num_parameters)} parameters in {result.kind}, "
        f"{format_bytes(result.num_bytes)}"
    )
    if result.why_no_tokenizer:
        say(f"no tokenizer was written: {result.why_no_tokenizer}; llama.cpp needs one to read text")
