"""`trine eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import Checkpoint, Device, Dtype, TextField


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE...", help="Text, .jsonl or .parquet files, folders of them, or URLs.  [required]"),
    ] = None,
    more_data: Annotated[list[str] | None, typer.Argument(metavar="--data FILE", hidden=True)] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens in view, the predicted one included.", show_default="the model's context"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens from one window to the next.", show_default="half the window"),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="A beginning-of-text token before each text.",
            show_default="as the tokenizer does",
        ),
    ] = None,
    text_field: TextField = "text",
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A LoRA adapter (PEFT), or the run folder of one.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on one line.")] = False,
) -> None:
    """Measure perplexity and bits per byte on texts. Long texts are read in a sliding window."""
    from trine.engine.errors import UsageError

    # An option takes one value: the files after the first one arrive as arguments.
    if not data:
        raise UsageError("no data; give --data FILE...")
    files = [*data, *(more_data or [])]

    import dataclasses

    from trine.engine.env import set_threads
    from trine.engine.evaluate.perplexity import perplexity
    from trine.engine.evaluate.texts import read_texts
    from trine.engine.generate.adapted import load_adapted
    from trine.engine.log import progress, warn

    set_threads(0)
    texts = read_texts(files, text_field=text_field)
    model, tokenizer = load_adapted(checkpoint, adapter, dtype=dtype, device=device)
    result = perplexity(model, tokenizer, texts, window=window, stride=stride, bos=bos, progress=progress)
    if result.unknown_tokens:
        warn(
            f"{result.unknown_tokens} of the tokens stand for characters the tokenizer does not know; "
            "what they were is not measured, so compare with no other tokenizer"
        )
    if json:
        import json as json_format

        print(json_format.dumps(dataclasses.asdict(result)))
        return
    print(
        f"perplexity      {result.perplexity:.4f}\n"
        f"loss            {result.loss:.4f} nats per token\n"
        f"bits per byte   {result.bits_per_byte:.4f}\n"
        f"scored          {result.tokens:,} tokens; {result.bytes:,} bytes in {result.texts} text(s)\n"
        f"window, stride  {result.window}, {result.stride} tokens\n"
        f"tokenizer       {tokenizer.vocab_size} ids, fingerprint {result.tokenizer[:12]}, "
        f"{'with' if result.bos else 'without'} a beginning-of-text token"
    )
