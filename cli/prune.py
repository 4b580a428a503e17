"""`trine prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trine.cli.options import (
    CalibrationLength,
    CalibrationSamples,
    Dtype,
    Evaluation,
    MaxMemory,
    ResumeLayers,
    SourceField,
    TargetField,
)


def prune(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="An unquantized Hugging Face folder, or a run folder.")
    ],
    more_data: Annotated[
        list[Path] | None, typer.Argument(metavar="--calibration FILE or --eval FILE", hidden=True)
    ] = None,
    sparsity: Annotated[
        str,
        typer.Option(metavar="SHARE", help="How many weights become 0, such as 0.5; or 2:4, two of four stay."),
    ] = "0.5",
    method: Annotated[
        str, typer.Option(metavar="NAME", help="magnitude; with --calibration wanda, which looks at inputs too.")
    ] = "magnitude",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; it must not exist.  [required]")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Text, .jsonl lines, conversations or pairs, for wanda."),
    ] = None,
    calibration_samples: CalibrationSamples = None,
    calibration_length: CalibrationLength = None,
    source_field: SourceField = None,
    target_field: TargetField = None,
    evaluation: Evaluation = None,
    max_memory: MaxMemory = None,
    resume: ResumeLayers = False,
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="The report as one JSON object on one line.")] = False,
) -> None:
    """Set the weights that matter least to 0, and report what that costs.

    The result is a dense checkpoint of the same size. It can be trained on, and quantized.
    """
    import json as json_format

    from trine.cli.calibration import files_of, read_samples
    from trine.engine.config import parse_bytes
    from trine.engine.env import DTYPES, set_threads
    from trine.engine.errors import UsageError
    from trine.engine.log import format_duration, say
    from trine.engine.model.checkpoint import resolve_checkpoint
    from trine.engine.model.quantized.scheme import choose
    from trine.engine.quantize.prune import METHODS, parse_sparsity
    from trine.engine.quantize.prune_run import PruneSettings, prune_checkpoint
    from trine.engine.quantize.report import table
    from trine.engine.quantize.run import check_folders

    if out is None:
        raise UsageError("--out DIR is missing; see trine prune --help")
    wanted = parse_sparsity(sparsity)
    choose("method", method, METHODS)
    if dtype != "auto":
        choose("dtype", dtype, DTYPES)
    limit = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
    set_threads(0)
    folder = resolve_checkpoint(checkpoint)
    check_folders(folder, out)
    texts = files_of(calibration, evaluation, more_data)
    fields = (source_field, target_field)
    samples, held_out = read_samples(folder, *texts, calibration_samples, calibration_length, fields)
    settings = PruneSettings(
        method=method,
        sparsity=wanted,
        calibration=samples,
        evaluation=held_out,
        dtype=DTYPES.get(dtype),
        max_memory=limit,
        resume=resume,
    )
    report = prune_checkpoint(folder, out, settings)
    print(json_format.dumps(report.to_json()) if json else table(report))
    say(f"{out} in {format_duration(report.seconds)}")
