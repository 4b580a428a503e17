"""Help texts: one style of names, and every option that may be repeated says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from trine.cli.main import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by the words that name it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_in_one_style(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*path, "--help"])
    assert done.exit_code == 0
    usage = done.output.splitlines()[0]
    assert not any(doubled in usage for doubled in ("[[", "{{", "......")), usage
    assert all(not line.startswith("  -") or "<list" not in line for line in done.output.splitlines())
    for parameter in COMMANDS[path].params:
        if parameter.param_type_name == "option" and parameter.multiple:
            assert "(repeatable)" in parameter.help or parameter.metavar.endswith("..."), parameter.name


def test_files_for_eval_follow_the_option() -> None:
    usage = CliRunner().invoke(app, ["eval", "--help"]).output.splitlines()[0]
    assert usage.endswith("[--data FILE]...")
