"""`trine eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trine.cli.options import Checkpoint, Device, Dtype, TextField

if TYPE_CHECKING:
    from trine.engine.evaluate.perplexity import PerplexityResult
    from trine.engine.text.tokenizer import Tokenizer


def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE...", help="Text, .jsonl or .parquet files, folders of them, or URLs: perplexity."),
    ] = None,
    more_data: Annotated[list[str] | None, typer.Argument(metavar="--data FILE", hidden=True)] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens in view, the predicted one included.", show_default="the model's context"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens from one window to the next.", show_default="half the window"),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="A beginning-of-text token before each text.",
            show_default="as the tokenizer does",
        ),
    ] = None,
    text_field: TextField = "text",
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness, groups or tags of them.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Their data, TASK/SPLIT.jsonl or .parquet; own tasks as .yaml.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(metavar="N", help="Examples before each question of a task.", show_default="as the task says"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N examples of a task.", show_default="all")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put tasks as conversations, by the chat template.")] = False,
    max_gen_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="New tokens of a task's answers at most.", show_default="as the task says"),
    ] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Write every example of a task with its answer.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Results of tasks; goes on where a run ended.", show_default="runs/eval/CHECKPOINT"
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="CHECKPOINT", help="Put tasks to this one too, side by side (repeatable)."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A LoRA adapter (PEFT), or the run folder of one.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on one line.")] = False,
) -> None:
    """Measure perplexity and bits per byte on texts (--data), or scores on tasks (--tasks).

    Long texts are read in a sliding window. Tasks are those of lm-evaluation-harness, which trine[eval] installs; their
    data comes from a folder, and nothing is downloaded.
    """
    import json as json_format

    from trine.engine.errors import UsageError

    if tasks is not None:
        _refuse(context, "--tasks", ("data", "window", "stride", "bos", "text_field"))
        if more_data:
            raise UsageError(f"unexpected {more_data[0]!r}; names of tasks are joined by commas")
        if task_data is None:
            raise UsageError("no data for the tasks; give --task-data DIR (nothing is downloaded)")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names:
            raise UsageError(f"--tasks {tasks!r} names no task")
        record = _tasks(
            [checkpoint, *(compare or [])],
            out,
            {
                "tasks": tuple(names),
                "data": task_data,
                "num_fewshot": num_fewshot,
                "limit": limit,
                "chat": chat,
                "max_gen_tokens": max_gen_tokens,
            },
            adapter=adapter,
            samples=samples,
            dtype=dtype,
            device=device,
        )
        if json:
            print(json_format.dumps(record))
        else:
            _print_tasks(record)
        return
    _refuse(
        context, "--data", ("task_data", "num_fewshot", "limit", "chat", "max_gen_tokens", "samples", "out", "compare")
    )
    # An option takes one value: the files after the first one arrive as arguments.
    if not data:
        raise UsageError("no data; give --data FILE..., or --tasks NAME,... with --task-data DIR")
    files = [*data, *(more_data or [])]

    import dataclasses

    from trine.engine.env import set_threads
    from trine.engine.evaluate.perplexity import perplexity
    from trine.engine.evaluate.texts import read_texts
    from trine.engine.generate.adapted import load_adapted
    from trine.engine.log import progress, warn

    set_threads(0)
    texts = read_texts(files, text_field=text_field)
    model, tokenizer = load_adapted(checkpoint, adapter, dtype=dtype, device=device)
    result = perplexity(model, tokenizer, texts, window=window, stride=stride, bos=bos, progress=progress)
    if result.unknown_tokens:
        warn(
            f"{result.unknown_tokens} of the tokens stand for characters the tokenizer does not know; "
            "what they were is not measured, so compare with no other tokenizer"
        )
    if json:
        print(json_format.dumps(dataclasses.asdict(result)))
    else:
        _print_perplexity(result, tokenizer)


def _refuse(context: typer.Context, chosen: str, parameters: tuple[str, ...]) -> None:
    """Raise `UsageError` for an option that means nothing here."""
    from trine.engine.errors import UsageError

    for name in parameters:
        if str(context.get_parameter_source(name)).rpartition(".")[2] == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')} does not go with {chosen}; leave it out")


def _tasks(checkpoints: list[Path], out: Path | None, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    from trine.engine.env import set_threads
    from trine.engine.evaluate.run_tasks import evaluate_tasks
    from trine.engine.evaluate.task_settings import TaskSettings
    from trine.engine.log import say

    set_threads(0)
    out = Path("runs/eval") / checkpoints[0].resolve().name if out is None else out
    record = evaluate_tasks(checkpoints, TaskSettings(**settings), out, **options)
    say(f"wrote {out / 'results.json'}")
    return record


def _print_tasks(record: dict[str, Any]) -> None:
    from trine.engine.evaluate.tables import table

    print(table(record["models"]))


def _print_perplexity(result: PerplexityResult, tokenizer: Tokenizer) -> None:
    from trine.engine.log import counted

    print(
        f"perplexity      {result.perplexity:.4f}\n"
        f"loss            {result.loss:.4f} nats per token\n"
        f"bits per byte   {result.bits_per_byte:.4f}\n"
        f"scored          {result.tokens:,} tokens; {result.bytes:,} bytes in {counted(result.texts, 'text')}\n"
        f"window, stride  {result.window}, {result.stride} tokens\n"
        f"tokenizer       {tokenizer.vocab_size} ids, fingerprint {result.tokenizer[:12]}, "
        f"{'with' if result.bos else 'without'} a beginning-of-text token"
    )
