"""`trine report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder that `trine train` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the run folder if left out.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run: curves, recipe, samples, environment."""
    from trine.engine.train.report import write_report

    print(write_report(run, out))
