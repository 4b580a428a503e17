"""The files behind --calibration and --eval of commands that look at what a model makes of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trine.engine.model.config import ModelConfig
    from trine.engine.quantize.samples import Pairs, Samples
    from trine.engine.text.tokenizer import Tokenizer


def files_of(
    calibration: list[Path] | None, evaluation: list[Path] | None, more: list[Path] | None
) -> tuple[list[Path], list[Path]]:
    """An option takes one value: the files after the first one arrive as arguments."""
    from trine.engine.errors import UsageError

    if more and bool(calibration) == bool(evaluation):
        raise UsageError(
            f"is {more[0]} for --calibration or --eval? with both, write the option before each file"
            if calibration
            else f"{more[0]} is one argument too many; files stand behind --calibration or --eval"
        )
    files = [*(calibration or []), *((more or []) if calibration else [])]
    return files, [*(evaluation or []), *((more or []) if evaluation else [])]


def read_samples(
    checkpoint: Path,
    calibration: list[Path],
    evaluation: list[Path],
    samples: int | None,
    length: int | None,
    fields: tuple[str | None, str | None] = (None, None),
) -> tuple[Samples | Pairs | None, Samples | Pairs | None]:
    """Samples to look at, and others to measure on. `fields`: --source-field and --target-field, as far as given."""
    from trine.engine.errors import UsageError
    from trine.engine.model.checkpoint import read_config
    from trine.engine.text.tokenizer import Tokenizer

    if samples is not None and not calibration:
        raise UsageError("--calibration-samples says how --calibration FILE is read; give such a file, or leave it out")
    if length is not None and not calibration and not evaluation:
        raise UsageError("--calibration-length says how text is read; give --calibration or --eval, or leave it out")
    if any(fields) and not calibration and not evaluation:
        raise UsageError("--source-field and --target-field say how pairs are read; give --calibration or --eval")
    if not calibration and not evaluation:
        return None, None
    config, tokenizer = read_config(checkpoint), Tokenizer.load(checkpoint)
    if any(fields) and config.encoder is None:
        raise UsageError(
            f"--source-field and --target-field are for encoder-decoders, and {checkpoint} is none; leave them out"
        )
    found = held_out = None
    if calibration:
        found, held_out = _read(
            calibration, tokenizer, config, fields, samples=samples, length=length, held_out=not evaluation
        )
    if evaluation:
        held_out, _ = _read(evaluation, tokenizer, config, fields, samples=None, length=length, held_out=False)
    return found, held_out


def _read(
    paths: list[Path],
    tokenizer: Tokenizer,
    config: ModelConfig,
    fields: tuple[str | None, str | None],
    *,
    samples: int | None,
    length: int | None,
    held_out: bool,
) -> tuple[Samples | Pairs, Samples | Pairs | None]:
    """Pairs where an encoder-decoder is given files of them, else text."""
    from trine.engine.log import say
    from trine.engine.quantize.calibration import read_calibration
    from trine.engine.quantize.pair_files import Fields, read_pairs

    seq2seq, context = config.encoder is not None, config.max_positions
    names = Fields(fields[0] or "source", fields[1] or "target")
    if seq2seq and (any(fields) or names.are_in(paths)):
        return read_pairs(paths, tokenizer, names, samples=samples, length=length, context=context, held_out=held_out)
    if seq2seq:
        say(
            f"{paths[0]} holds no pairs (JSON lines with {names.source!r} and {names.target!r}): each piece of text is "
            "its own target"
        )
    return read_calibration(
        paths, tokenizer, samples=samples, length=length, context=context, held_out=held_out, ended=seq2seq
    )
