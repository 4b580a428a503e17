"""The `trine` command: one sub-command per file, and one place where errors become a line and an exit status.

Only typer is imported here; every command imports the rooms it needs inside its function, so that `trine --help`
answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from trine.cli import (
    bench,
    chat,
    classify,
    data,
    data_inspect,
    doctor,
    embed,
    export,
    generate,
    import_model,
    inspect_checkpoint,
    merge,
    prune,
    quantize,
    quickstart,
    report,
    rotate,
    serve,
    tokenizer,
    train,
    translate,
)
from trine.cli import eval as evaluate
from trine.cli.ending import ended_by_signals

# typer's error for a wrong command line: the base of its one public class of that kind.
_WrongUsage = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="trine",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command takes --debug for a traceback. Exit status: 0 success, 1 failure, 2 wrong usage.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trine {version('trine')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train Transformers, measure, quantize and serve them, exact and resumable to the bit."""


# In the list of commands, where a first sentence would be cut: at most 64 characters each.
app.command("quickstart", short_help="Train, evaluate, quantize and use a small code model.")(quickstart.quickstart)
app.add_typer(tokenizer.app, name="tokenizer")
data.app.command("inspect", short_help="Show samples as training sees them, and token statistics.")(
    data_inspect.inspect
)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("eval", short_help="Measure perplexity on texts, or scores on tasks.")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("embed", short_help="Turn every row of a file into an embedding.")(embed.embed)
app.command("classify", short_help="Give every row of a file a class, a score or tags.")(classify.classify)
app.command("translate", short_help="Give every row of a file to an encoder-decoder.")(translate.translate)
app.command("merge", short_help="Add a LoRA adapter into the weights of its base.")(merge.merge)
app.command("import", short_help="Make a folder of a model of llama.cpp, Meta or nanoGPT.")(import_model.import_model)
app.command("export", short_help="Write a checkpoint in another dtype, or as a GGUF file.")(export.export)
app.command("inspect", short_help="Show what is inside a checkpoint, and what is wrong with it.")(
    inspect_checkpoint.inspect
)
app.command("quantize", short_help="Write a smaller checkpoint with quantized weights.")(quantize.quantize)
app.command("prune", short_help="Set the weights that matter least to 0.")(prune.prune)
app.command("rotate", short_help="Turn a model so that it loses less by quantizing.")(rotate.rotate)
app.command("serve", short_help="Serve a model over HTTP, as OpenAI's API.")(serve.serve)
app.command("report", short_help="Write an HTML page about a run, or about several.")(report.report)
app.add_typer(bench.app, name="bench", short_help="Time Trine against other programs, as ratios.")
app.command("doctor", short_help="Show hardware, versions, and what will be used and why.")(doctor.doctor)


def main() -> None:
    """Run the command line in `sys.argv`; never returns.

    Exits with 0, 1, 2, 130 (interrupted) or 143 (SIGTERM, where a command has no handling of its own).
    """
    with ended_by_signals():
        _run(sys.argv[1:])


def _run(arguments: list[str]) -> NoReturn:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status = app(arguments, prog_name="trine", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        _end_quietly()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # what typer makes of it
            _end_quietly()
        raise
    except Exception as error:
        if debug:
            raise
        line, status = _explain(error, arguments)
        print(line, file=sys.stderr)
        sys.exit(status)


def _end_quietly() -> NoReturn:
    """The reader of stdout went away (`| head`): it has what it wanted, and nothing is complained of."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(0)


def _explain(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """The line to print and the exit status."""
    if isinstance(error, _WrongUsage):
        return _explain_usage(error, arguments), 2
    line, status = _explain_failure(error)
    return f"trine: {line}", status


def _explain_disk(error: OSError) -> str:
    """What is written under a hidden name at first is no name for people: its folder is."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if place is not None:
        place = place.parent if place.name.startswith(".") else place
    return f"cannot write {place or 'the result'} ({error.strerror}); make room there, or choose another place"


def _explain_usage(error: Any, arguments: list[str]) -> str:
    message = error.format_message().replace("Value error, ", "")
    if message.startswith("Usage:"):
        return str(message)  # a group of commands without one: its help
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if option in arguments[:-1] and repr(value := arguments[arguments.index(option) + 1]) not in message:
            message = f"{message.rstrip('.')}, not {value!r}"
    help_of = "" if error.ctx is None else f"`{error.ctx.command_path} --help`"
    if not help_of:
        return f"trine: {message.rstrip('.')}"
    return (
        f"trine: {message} See {help_of}" if message.endswith("?") else f"trine: {message.rstrip('.')}; see {help_of}"
    )


def _explain_failure(error: Exception) -> tuple[str, int]:
    from trine.engine.errors import TrineError

    if isinstance(error, TrineError):
        return str(error), error.exit_status
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return _explain_disk(error), 1
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or error}", 1
    if isinstance(error, ModuleNotFoundError) and not (error.name or "trine").startswith("trine"):
        return (
            f"the Python package {error.name!r} is not installed; install Trine with its dependencies (make setup)",
            1,
        )
    return f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback", 1
