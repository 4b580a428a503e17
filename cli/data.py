"""`trine data`: turn text into token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prepare text for training.")


@app.callback()
def callback() -> None:
    """Prepare text for training."""


@app.command("prepare")
def prepare(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Text files, folders, or .jsonl files.")],
    tokenizer: Annotated[Path, typer.Option(metavar="DIR", help="A tokenizer folder (trine tokenizer train).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the shards and their manifest.")],
    validation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Text for the validation split (repeatable).")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(metavar="X", help="Share of the documents to hold out, by a hash of their names.")
    ] = 0.0,
    split_seed: Annotated[int, typer.Option(metavar="N", help="Another seed holds out other documents.")] = 0,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="Field of a .jsonl line that holds the text.")
    ] = "text",
    suffix: Annotated[
        list[str] | None, typer.Option(metavar=".EXT", help="Take only such files of a folder (repeatable).")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad UTF-8, empty files and broken lines instead of stopping.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace data that was prepared from something else.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Threads (default: one per core); changes nothing in the result.")
    ] = None,
) -> None:
    """Encode text into memory-mapped shards; a second run with nothing changed does nothing."""
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
