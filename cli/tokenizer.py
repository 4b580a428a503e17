"""`trine tokenizer`: learn a vocabulary."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from trine.cli.options import SkipBad, Suffixes, TextField, TextFiles

app = typer.Typer(no_args_is_help=True)


class Kind(StrEnum):
    """What the ids stand for."""

    BPE = "bpe"
    UNIGRAM = "unigram"
    WORDPIECE = "wordpiece"
    CHAR = "char"


@app.callback()
def callback() -> None:
    """Learn a tokenizer from text."""


@app.command("train")
def train(
    files: TextFiles,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for tokenizer.json and tokenizer_config.json.")],
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="Number of ids, special tokens included; not for --kind char.")
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            metavar="bpe|unigram|wordpiece|char",
            help="Byte-level BPE; unigram pieces and bytes for the rest; BERT's WordPiece; one id per character.",
        ),
    ] = Kind.BPE,
    special_token: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="A special token beside those of the kind, not for --kind char (repeatable)."
        ),
    ] = None,
    roles: Annotated[
        Literal["decoder", "encoder", "encoder-decoder"],
        typer.Option(
            metavar="decoder|encoder|encoder-decoder",
            help="Which model it is for: an encoder needs tokens that begin a text, hide and pad, an encoder-decoder "
            "one that pads, and sentinels. --kind wordpiece is for encoders already.",
        ),
    ] = "decoder",
    sentinels: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Of an encoder-decoder, tokens that mark hidden spans, counted in the vocabulary.",
            show_default="100",
        ),
    ] = None,
    text_field: TextField = "text",
    suffix: Suffixes = None,
    skip_bad: SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tokenizer that is there already.")] = False,
) -> None:
    """Learn a tokenizer and write its folder. transformers loads it with identical ids."""
    from trine.engine.data.files import find_sources
    from trine.engine.data.sources import read_texts
    from trine.engine.errors import UsageError
    from trine.engine.log import say, warn
    from trine.engine.storage import writing
    from trine.engine.text.train_tokenizer import (
        END_OF_TEXT,
        role_tokens,
        train_bpe,
        train_characters,
        train_unigram,
        train_wordpiece,
        with_roles,
    )

    if kind is not Kind.CHAR and vocab_size is None:
        raise UsageError(f"--vocab-size is needed with --kind {kind.value}, such as --vocab-size 4096")
    if kind is Kind.CHAR and (vocab_size is not None or special_token):
        raise UsageError("--vocab-size and --special-token have no effect with --kind char; leave them out")
    if kind is Kind.WORDPIECE and roles != "decoder":
        raise UsageError(f"--roles {roles} does not go with --kind wordpiece, which is BERT's; leave it out")
    if sentinels is not None and roles != "encoder-decoder":
        raise UsageError(f"--sentinels {sentinels} has no effect without --roles encoder-decoder; leave it out")
    num_sentinels = (sentinels or 100) if roles == "encoder-decoder" else 0
    if out.is_file() or ((out / "tokenizer.json").exists() and not overwrite):
        raise UsageError(f"{out} exists already; use --overwrite or another --out")
    texts = read_texts(find_sources(files, suffixes=suffix or ()), text_field=text_field, skip_bad=skip_bad)
    if vocab_size is not None:
        more = special_token or []
        if kind is Kind.WORDPIECE:
            tokenizer = train_wordpiece(texts, vocab_size=vocab_size, special_tokens=more)
        else:
            learn = train_unigram if kind is Kind.UNIGRAM else train_bpe
            special_tokens = [END_OF_TEXT, *role_tokens(roles), *more]
            tokenizer = learn(texts, vocab_size=vocab_size - num_sentinels, special_tokens=special_tokens)
    else:
        tokenizer = train_characters(texts)
    if roles != "decoder":
        tokenizer = with_roles(tokenizer, roles, sentinels=num_sentinels)
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        warn(f"the text is too small for {vocab_size} ids: the vocabulary has {tokenizer.vocab_size}")
    with writing(out):
        tokenizer.save(out)
    say(f"wrote {out}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}")
