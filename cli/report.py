"""`trine report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder that `trine train` wrote.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Write one HTML page about a run. Curves, recipe, samples and environment; nothing outside the page is loaded."""
    from trine.engine.train.report import write_report

    print(write_report(run, out))
