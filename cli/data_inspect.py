"""`trine data inspect`: what is in a prepared folder, as text or JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from trine.engine.data.inspect import InspectedSample, SplitStatistics

_BAR = 40


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by trine data prepare.")],
    split: Annotated[
        Literal["train", "validation"], typer.Option(metavar="train|validation", help="Which split to look at.")
    ] = "train",
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="How many samples to show.")] = 2,
    seq_len: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in a sample, as data.seq_len.")] = 128,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which order of the samples, as train.seed.")] = 0,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="How many of the most frequent tokens to list.")] = 15,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on one line.")] = False,
) -> None:
    """Show samples as training sees them, document borders and targets marked, and token statistics."""
    from trine.engine.data.inspect import inspected_samples, split_statistics
    from trine.engine.data.shards import TokenShards
    from trine.engine.text.tokenizer import Tokenizer

    shards = TokenShards.open(folder, split)
    tokenizer = Tokenizer.load(shards.tokenizer_dir)
    statistics = split_statistics(shards, tokenizer, top=top)
    samples = inspected_samples(folder, split, tokenizer, count=sample, seq_len=seq_len, seed=seed) if sample else ()
    if json:
        import json as json_format

        content = {
            "folder": str(folder),
            "split": split,
            "tokenizer": shards.tokenizer_fingerprint,
            **asdict(statistics),
            "samples": [asdict(one) for one in samples],
        }
        print(json_format.dumps(content, ensure_ascii=False))
        return
    print(f"{folder}, {split} split, tokenizer {shards.tokenizer_fingerprint[:12]} of {tokenizer.vocab_size} ids")
    _print_statistics(statistics)
    for one in samples:
        _print_sample(one, shards.num_tokens)


def _print_statistics(found: SplitStatistics) -> None:
    from trine.engine.log import format_bytes

    per_token = "" if found.bytes_per_token is None else f", {found.bytes_per_token:.3f} bytes per token"
    print(
        f"tokens    {found.tokens:,} in {found.documents:,} documents; {format_bytes(found.bytes)} of text{per_token}"
    )
    unknown = "" if found.unknown_tokens is None else f"; {found.unknown_tokens:,} unknown tokens"
    print(f"ids       {found.ids_used:,} of {found.vocab_size:,} occur{unknown}")
    lengths = found.lengths
    print(
        f"lengths   {lengths.least:,} to {lengths.most:,} tokens a document, mean {lengths.mean:,.1f}, median "
        f"{lengths.median:,}; nine of ten between {lengths.percentile_5:,} and {lengths.percentile_95:,}"
    )
    most = max(count for _, _, count in lengths.histogram)
    width = len(f"{lengths.histogram[-1][1] - 1:,}")
    for low, high, count in lengths.histogram:
        bar = "#" * -(-_BAR * count // most)
        print(f"  {low:>{width},} to {high - 1:>{width},}  {bar:<{_BAR}}  {count:,}")
    if found.most_frequent:
        print("most frequent tokens")
    for token in found.most_frequent:
        print(f"  {token.token_id:>7}  {token.share:6.2%}  {token.count:>14,}  {token.text!r}")


def _print_sample(sample: InspectedSample, num_tokens: int) -> None:
    from trine.engine.log import printable

    last = (sample.first_token + len(sample.ids) - 1) % num_tokens
    print(
        f"\nsample {sample.number}: tokens {sample.first_token:,} to {last:,}, loss at {sum(sample.loss)} of "
        f"{len(sample.ids)} positions; at ⟦…⟧ there is none"
    )
    for segment in sample.segments:
        begins = "from its beginning" if segment.from_token == 0 else f"from its token {segment.from_token:,} on"
        print(
            f"  -- document {segment.document:,} {begins}: positions {segment.first_position} to "
            f"{segment.first_position + segment.length - 1}, loss at {segment.targets}"
        )
        text = "".join(part if taken else f"⟦{part}⟧" for part, taken in segment.runs)
        print("".join(f"     | {line}\n" for line in printable(text).split("\n")), end="")
