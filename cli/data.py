"""`trine data`: turn text into token shards, and look into them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import SkipBad, Suffixes, TextField, TextFiles

app = typer.Typer(no_args_is_help=True)


@app.callback()
def callback() -> None:
    """Prepare text for training, and look at what was prepared."""


@app.command("prepare")
def prepare(
    files: TextFiles,
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="A tokenizer folder (trine tokenizer train).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the shards and their manifest.")],
    validation: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Text, likewise, for the validation split (repeatable).")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(metavar="X", help="Share of the documents to hold out, by a hash of their names.")
    ] = 0.0,
    split_seed: Annotated[int, typer.Option(metavar="N", help="Another seed holds out other documents.")] = 0,
    text_field: TextField = "text",
    suffix: Suffixes = None,
    skip_bad: SkipBad = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace data that was prepared from something else.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads; changes nothing in the result.", show_default="one per core"),
    ] = None,
) -> None:
    """Encode text into memory-mapped shards. A second run with nothing changed does nothing."""
    from trine.engine.data.prepare import prepare as run
    from trine.engine.log import format_bytes, format_count, say

    result = run(
        files,
        tokenizer_dir=tokenizer,
        out=out,
        validation_files=validation or (),
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        text_field=text_field,
        suffixes=suffix or (),
        skip_bad=skip_bad,
        overwrite=overwrite,
        workers=workers,
    )
    say(f"{out}: nothing has changed, nothing to do" if result.unchanged else f"wrote {out}")
    for split, facts in result.manifest["splits"].items():
        say(
            f"  {split}: {format_count(facts['num_documents'])} documents, {format_count(facts['num_tokens'])} tokens, "
            f"{format_bytes(facts['num_bytes'])} of text"
        )
    if result.manifest["num_skipped"]:
        say(f"  left out: {result.manifest['num_skipped']} bad inputs, listed in {out / 'manifest.json'}")
