"""`trine quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="A Hugging Face folder, or a run folder."),
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(metavar="NAME", help="w4a16, w8a16, w8a8, fp8 or fp8-block.  [required]")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="rtn, or rtn-mse, which searches for scales.")] = "rtn",
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
    check: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Look at a quantized folder instead, and say what is wrong.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The report as one JSON object on one line.")] = False,
) -> None:
    """Write a smaller checkpoint with quantized weights, in the format compressed-tensors."""
    import json as json_format

    from trine.engine.errors import CheckpointError, UsageError

    if check is not None:
        if checkpoint or scheme or out or group_size or asymmetric or json or method != "rtn":
            raise UsageError("--check DIR stands alone; leave out CHECKPOINT and every other option")
        from trine.engine.quantize.check import check_folder

        findings = check_folder(check)
        for line in findings:
            print(line)
        if findings:
            raise CheckpointError(f"{check} has {len(findings)} fault(s)")
        print(f"{check}: no fault found")
        return
    if checkpoint is None or scheme is None or out is None:
        missing = "CHECKPOINT" if checkpoint is None else "--scheme NAME" if scheme is None else "--out DIR"
        raise UsageError(f"{missing} is missing; see trine quantize --help")

    from trine.engine.env import set_threads
    from trine.engine.log import format_duration, say
    from trine.engine.model.checkpoint import resolve_checkpoint
    from trine.engine.model.quantized.scheme import choose, make_scheme
    from trine.engine.quantize.methods import METHODS
    from trine.engine.quantize.report import table
    from trine.engine.quantize.run import quantize_checkpoint

    chosen = make_scheme(scheme, group_size=group_size, symmetric=not asymmetric)
    how = METHODS[choose("method", method, METHODS)]
    set_threads(0)
    report = quantize_checkpoint(
        resolve_checkpoint(checkpoint), out, scheme_name=scheme, scheme=chosen, method_name=method, method=how
    )
    print(json_format.dumps(report.to_json()) if json else table(report))
    say(f"{out} in {format_duration(report.seconds)}")
