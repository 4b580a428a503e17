"""The files behind --calibration and --eval of commands that look at what a model makes of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trine.engine.quantize.calibration import Samples


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
    checkpoint: Path, calibration: list[Path], evaluation: list[Path], samples: int | None, length: int | None
) -> tuple[Samples | None, Samples | None]:
    """Samples to look at, and others to measure on."""
    from trine.engine.errors import UsageError
    from trine.engine.model.checkpoint import read_config
    from trine.engine.quantize.calibration import read_calibration
    from trine.engine.text.tokenizer import Tokenizer

    if samples is not None and not calibration:
        raise UsageError("--calibration-samples says how --calibration FILE is read; give such a file, or leave it out")
    if length is not None and not calibration and not evaluation:
        raise UsageError("--calibration-length says how text is read; give --calibration or --eval, or leave it out")
    if not calibration and not evaluation:
        return None, None
    context, tokenizer = read_config(checkpoint).max_positions, Tokenizer.load(checkpoint)
    found = held_out = None
    if calibration:
        found, held_out = read_calibration(
            calibration, tokenizer, samples=samples, length=length, context=context, held_out=not evaluation
        )
    if evaluation:
        held_out, _ = read_calibration(evaluation, tokenizer, length=length, context=context)
    return found, held_out
