"""`trine report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders that `trine train` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page to write.", show_default="RUN/report.html; of several comparison.html"
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several side by side.

    Curves, recipe, samples and environment; of several runs the differences. Nothing outside the page is loaded.
    """
    from trine.engine.train.comparison import write_comparison
    from trine.engine.train.report import write_report

    print(write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out))
