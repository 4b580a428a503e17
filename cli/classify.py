"""`trine classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import BatchTokens, BulkField, BulkFile, Checkpoint, Device, Dtype, Restart, Truncate


def classify(
    checkpoint: Checkpoint,
    file: BulkFile,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .jsonl file: an object for each row.")],
    field: BulkField = None,
    pair_field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The second text of each row, for models of pairs.", show_default="none"),
    ] = None,
    batch_tokens: BatchTokens = 4096,
    truncate: Truncate = False,
    restart: Restart = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Classify every row of a file, a text or a pair of texts, in the order of the file.

    A line of --out has row, and label, score and scores; of a model with one class, such as a cross-encoder, score
    alone; of a tagger words, labels and scores, where a row is a text that is split at spaces, or a list of words. A
    run that was interrupted goes on where it ended when the same command is given again.
    """
    from trine.engine.env import set_threads
    from trine.engine.errors import UsageError
    from trine.engine.generate.bulk import CLASSES, BulkSettings, classify_file, open_for_vectors
    from trine.engine.generate.texts_file import TextsFile
    from trine.engine.generate.unfinished import check_out
    from trine.engine.log import say

    check_out(out, CLASSES)
    fields = None if field is None and pair_field is None else [field or "text", *([pair_field] if pair_field else [])]
    TextsFile.find(file, fields)  # what is wrong with it is said before a model is loaded
    set_threads(0)
    engine, info, computed = open_for_vectors(checkpoint, dtype=dtype, device=device, batch_tokens=batch_tokens)
    if info.kind == "tagging" and pair_field is not None:
        raise UsageError(f"--pair-field {pair_field} does not go with a model that tags words; leave it out")
    texts = TextsFile.find(file, fields, words=info.kind == "tagging")
    settings = BulkSettings(checkpoint=str(checkpoint.resolve()), dtype=computed, truncate=truncate, restart=restart)
    done = classify_file(engine, info, texts, out, settings)
    say(f"{done.text()}; {out}")
