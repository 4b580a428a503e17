"""`trine translate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import BatchTokens, BulkField, BulkFile, Checkpoint, Device, Dtype, Restart, Truncate

_OWN = "as generation_config.json says"


def translate(
    checkpoint: Checkpoint,
    file: BulkFile,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help=".txt: a line for each row; .jsonl: an object with row, text, token_ids."),
    ],
    field: BulkField = None,
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help='Put before every text, such as "translate English to German: ".')
    ] = "",
    beams: Annotated[
        int | None,
        typer.Option(metavar="N", help="Beams of the search; 1 is greedy.", show_default=f"{_OWN}, or 4"),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="A",
            help="Scores are divided by length ** A: above 0 favours long texts.",
            show_default=f"{_OWN}, or 1",
        ),
    ] = None,
    early_stopping: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help="true: at N finished texts; false or never: when none that is better can come.",
            show_default=f"{_OWN}, or false",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="At most so many new tokens.", show_default=f"{_OWN}, or 256"),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="No end before so many tokens.", show_default=_OWN)
    ] = None,
    no_repeat: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="No run of N tokens twice in a text; 0 is off.", show_default=_OWN),
    ] = None,
    batch_tokens: BatchTokens = 4096,
    truncate: Truncate = False,
    restart: Restart = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Give every row of a file to an encoder-decoder as its source; write what it answers, in the order of the file.

    CHECKPOINT is a T5, a Marian or the like, for whatever it was trained: translating, summarizing, rewriting. A run
    that was interrupted goes on where it ended when the same command is given again.
    """
    from trine.engine.env import set_threads
    from trine.engine.generate.load import load_for_inference
    from trine.engine.generate.search_settings import search_settings
    from trine.engine.generate.texts_file import TextsFile
    from trine.engine.generate.translate_file import JSON, TEXT, TranslateSettings, translate_file
    from trine.engine.generate.unfinished import check_out
    from trine.engine.log import say
    from trine.engine.model.checkpoint import resolve_checkpoint

    check_out(out, (TEXT, JSON))
    texts = TextsFile.find(file, [field] if field else None)
    set_threads(0)
    folder = resolve_checkpoint(checkpoint)
    search = search_settings(
        folder, num_beams=beams, length_penalty=length_penalty, early_stopping=early_stopping, max_tokens=max_tokens,
        min_tokens=min_tokens, no_repeat=no_repeat,
    )  # fmt: skip
    model, tokenizer = load_for_inference(folder, dtype=dtype, device=device)
    settings = TranslateSettings(
        checkpoint=str(checkpoint.resolve()),
        search=search,
        prefix=prefix,
        truncate=truncate,
        batch_tokens=batch_tokens,
        restart=restart,
    )
    done = translate_file(model, tokenizer, texts, out, settings)
    say(f"{done.text(tokens='new tokens')}; {out}")
