"""`trine embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import BatchTokens, BulkField, BulkFile, Checkpoint, Device, Dtype, Restart, Truncate


def embed(
    checkpoint: Checkpoint,
    file: BulkFile,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help=".npy: float32 [rows, numbers]; .parquet: a column embedding.")
    ],
    field: BulkField = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Put before every text, such as "query: ".', show_default="none"),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Put this prompt of the checkpoint's there.", show_default="its default"),
    ] = None,
    batch_tokens: BatchTokens = 4096,
    truncate: Truncate = False,
    restart: Restart = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Turn every row of a file into an embedding, in the order of the file.

    CHECKPOINT is an encoder, best with the files of sentence-transformers beside it; without them the mean of the
    hidden states is taken. A run that was interrupted goes on where it ended when the same command is given again.
    """
    from trine.engine.env import set_threads
    from trine.engine.errors import UsageError
    from trine.engine.generate.bulk import EMBEDDINGS, BulkSettings, embed_file, open_for_vectors, prefix_of
    from trine.engine.generate.texts_file import TextsFile
    from trine.engine.generate.unfinished import check_out
    from trine.engine.log import say

    if prefix is not None and prompt_name is not None:
        raise UsageError("--prefix and --prompt-name both say what goes before a text; give one")
    check_out(out, EMBEDDINGS)
    texts = TextsFile.find(file, [field] if field else None)
    set_threads(0)
    engine, info, computed = open_for_vectors(checkpoint, dtype=dtype, device=device, batch_tokens=batch_tokens)
    settings = BulkSettings(
        checkpoint=str(checkpoint.resolve()),
        dtype=computed,
        prefix=prefix_of(info, prefix, prompt_name),
        truncate=truncate,
        restart=restart,
    )
    done = embed_file(engine, info, texts, out, settings)
    say(f"{done.text()}; {out}")
