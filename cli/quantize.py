"""`trine quantize`."""

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


def quantize(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder, or a run folder."),
    ] = None,
    more_data: Annotated[
        list[Path] | None, typer.Argument(metavar="--calibration FILE or --eval FILE", hidden=True)
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(metavar="NAME", help="w4a16, w8a16, w8a8, fp8 or fp8-block.  [required]")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="rtn, rtn-mse, hqq; with --calibration rtn-weighted, gptq, awq, smoothquant."
        ),
    ] = "rtn",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; it must not exist.  [required]")
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Weights that share a scale: 32, 64, 128 or channel.", show_default="as the scheme"
        ),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Zero points beside the scales (w4a16).")] = False,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much of its burden smoothquant takes from the inputs, 0 to 1.",
            show_default="searched for, layer by layer",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="Another scheme (w4a16:32, w8a16, ...) or none for layers whose path fits (repeatable); the first "
            "that fits counts.",
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="int8", help="The embedding in 8 bits too; with tied weights also --head.", show_default="as it is"
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="The output layer in 8 bits too; with tied weights also --embeddings.",
            show_default="as it is",
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The key/value cache that the result asks for: int8, fp8 on a GPU, fp8-static for vLLM.",
            show_default="as computed",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="NAME", help="compressed-tensors, or gptq (symmetric w4a16 and w8a16).")
    ] = "compressed-tensors",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Text, .jsonl lines, conversations or pairs, for methods that look at the inputs of layers, and for "
            "fp8-static.",
        ),
    ] = None,
    calibration_samples: CalibrationSamples = None,
    calibration_length: CalibrationLength = None,
    source_field: SourceField = None,
    target_field: TargetField = None,
    evaluation: Evaluation = None,
    max_memory: MaxMemory = None,
    resume: ResumeLayers = False,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")] = True,
    dtype: Dtype = "auto",
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Look at a quantized folder instead, and say what is wrong.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The report as one JSON object on one line.")] = False,
) -> None:
    """Write a smaller checkpoint with quantized weights, and a report of what that costs."""
    import json as json_format

    from trine.engine.errors import CheckpointError, UsageError

    given = any(
        (
            checkpoint,
            scheme,
            out,
            group_size,
            asymmetric,
            alpha is not None,
            override,
            embeddings,
            head,
            kv_cache,
            calibration,
            calibration_samples,
            more_data,
        )
    )
    given |= any((calibration_samples, calibration_length, evaluation, max_memory, resume, json))
    given |= any((source_field, target_field))
    if check is not None:
        if given or (method, form, dtype, speed) != ("rtn", "compressed-tensors", "auto", True):
            raise UsageError("--check DIR stands alone; leave out CHECKPOINT and every other option")
        from trine.engine.log import counted
        from trine.engine.quantize.check import check_folder

        findings = check_folder(check)
        for line in findings:
            print(line)
        if findings:
            raise CheckpointError(f"{check} has {counted(len(findings), 'fault')}")
        print(f"{check}: no fault found")
        return
    if checkpoint is None or scheme is None or out is None:
        missing = "CHECKPOINT" if checkpoint is None else "--scheme NAME" if scheme is None else "--out DIR"
        raise UsageError(f"{missing} is missing; see trine quantize --help")

    from trine.cli.calibration import files_of, read_samples
    from trine.engine.config import parse_bytes
    from trine.engine.env import DTYPES, set_threads
    from trine.engine.log import format_duration, say
    from trine.engine.model.checkpoint import resolve_checkpoint
    from trine.engine.model.quantized.cache_scheme import choose_cache
    from trine.engine.model.quantized.scheme import choose, make_scheme
    from trine.engine.quantize.choices import parse_override
    from trine.engine.quantize.methods import METHODS, check_pair, with_alpha
    from trine.engine.quantize.report import table
    from trine.engine.quantize.run import Settings, check_calibration, check_folders, quantize_checkpoint
    from trine.engine.quantize.tables import wants_table
    from trine.engine.quantize.writers import WRITERS

    chosen = make_scheme(scheme, group_size=group_size, symmetric=not asymmetric)
    how = with_alpha(choose("method", method, METHODS), alpha)
    overrides = tuple(map(parse_override, override or ()))
    for name, one in ((scheme, chosen), *((other.text, other.scheme) for other in overrides if other.scheme)):
        check_pair(method, name, one)
    if dtype != "auto":
        choose("dtype", dtype, DTYPES)
    name = method if alpha is None else f"{method} with alpha {alpha:g}"
    cache = None if kv_cache is None else choose_cache(kv_cache)
    tables = wants_table("--embeddings", embeddings), wants_table("--head", head)
    writer = WRITERS[choose("format", form, WRITERS)]
    limit = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
    texts = files_of(calibration, evaluation, more_data)
    check_calibration(name, how, cache, given=bool(texts[0]))
    set_threads(0)
    folder = resolve_checkpoint(checkpoint)
    check_folders(folder, out)
    # Reading data may take a while: what is wrong with the rest was said by now.
    samples, held_out = read_samples(
        folder, *texts, calibration_samples, calibration_length, (source_field, target_field)
    )
    settings = Settings(
        scheme_name=scheme,
        scheme=chosen,
        method_name=name,
        method=how,
        overrides=overrides,
        embeddings=tables[0],
        head=tables[1],
        cache=cache,
        writer=writer,
        calibration=samples,
        evaluation=held_out,
        dtype=DTYPES.get(dtype),
        max_memory=limit,
        resume=resume,
        speed=speed,
    )
    report = quantize_checkpoint(folder, out, settings)
    print(json_format.dumps(report.to_json()) if json else table(report))
    say(f"{out} in {format_duration(report.seconds)}")
