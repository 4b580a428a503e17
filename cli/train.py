"""`trine train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe: a TOML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's, such as optim.lr=3e-4."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|DIR",
            help="auto continues the run folder's latest step, if any; never begins anew, and refuses a folder that "
            "holds a run; DIR, a step or run folder, continues from there.",
        ),
    ] = "auto",
    on_spike: Annotated[
        str | None,
        typer.Option(
            metavar="off|stop|rollback",
            help="At a loss spike, or a loss or gradient that is not finite: stop, or go back to the last checkpoint "
            "and past the data since. The same as spike.action=...; off stops only where something is not finite.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its cost; write nothing.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Record these steps, such as 10:12: a Chrome trace and a table of operations, in RUN/profile.",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Train on N processes of this machine, each with a GPU of its own or a part of the cores. Under "
            "torchrun leave it out.",
            show_default="1",
        ),
    ] = None,
    rank_timeout: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="End a run of several processes where one keeps the others waiting so long.",
        ),
    ] = 60,
    lr_range: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:MAX[:STEPS]",
            help="Instead of the run, train STEPS (100) steps while the learning rate rises from MIN to MAX, and "
            "suggest one; writes RUN.lr-range.json and .svg.",
        ),
    ] = None,
) -> None:
    """Train a model from a recipe, or continue training it."""
    from trine.engine.errors import UsageError
    from trine.engine.train.launch import Wanted, refuse_ranks, run
    from trine.engine.train.launch import dry_run as show
    from trine.engine.train.lr_range import lr_range_test, parse_range
    from trine.engine.train.profile import parse_steps
    from trine.engine.train.recipe import load_recipe

    changes = [*(overrides or ()), *([] if on_spike is None else [f"spike.action={on_spike}"])]
    steps = None if profile is None else parse_steps(profile)
    if dry_run and profile is not None:
        raise UsageError("--profile has no effect beside --dry-run, which trains nothing; give one of them")
    if lr_range is None and dry_run:
        show(load_recipe(recipe, changes), resume=resume, nproc=nproc)
        return
    if lr_range is None:
        wanted = Wanted(recipe=load_recipe(recipe, changes), resume=resume, profile=steps, patience=rank_timeout)
        run(wanted, nproc=nproc)
        return
    given = {
        "--resume": resume != "auto",
        "--dry-run": dry_run,
        "--profile": profile is not None,
        "--nproc": nproc is not None,
    }
    if others := [option for option, is_given in given.items() if is_given]:
        raise UsageError(f"{others[0]} has no effect beside --lr-range, which trains no run; give one of them")
    refuse_ranks("--lr-range")
    print(lr_range_test(load_recipe(recipe, changes), parse_range(lr_range)))
