"""`trine chat`: a conversation at the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trine.cli.options import Checkpoint, Device, Dtype, MinP, Temperature, TopK, TopP

if TYPE_CHECKING:
    from trine.engine.text.chat import ChatTemplate
    from trine.engine.text.tokenizer import Tokenizer


def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    chat_template: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="One of the tokenizer's named templates, or a .jinja file.")
    ] = "default",
    load: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on with a conversation from /save.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the conversation at the end.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="At most so many tokens an answer.")] = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Makes the conversation repeatable.", show_default="another each time"),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this string (repeatable).")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk with a model. Answers are streamed; Ctrl-C stops one, Ctrl-D ends the conversation, /help lists commands.

    Where stdin is no terminal, each line is something said (or a command) and each answer is printed.
    """
    from trine.engine.env import set_threads
    from trine.engine.errors import UsageError
    from trine.engine.generate.chat_session import Session
    from trine.engine.generate.conversation import Conversation, read_conversation
    from trine.engine.generate.engine import Engine, EngineConfig
    from trine.engine.generate.load import load_for_inference, load_tokenizer
    from trine.engine.generate.sampling import SamplingParams
    from trine.engine.model.checkpoint import resolve_checkpoint

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        stop=tuple(stop or ()),
    )  # fmt: skip
    # What is wrong with these is said before a model is loaded.
    if save is not None and (save.is_dir() or not save.parent.is_dir()):
        raise UsageError(f"--save {save} is not a file in a folder that is there; give another, or make the folder")
    said_before, messages = (None, []) if load is None else read_conversation(load)
    folder = resolve_checkpoint(checkpoint)
    tokenizer = load_tokenizer(folder)
    template = _template(tokenizer, chat_template, folder)
    set_threads(0)
    model, _ = load_for_inference(folder, dtype=dtype, device=device, tokenizer=tokenizer)
    conversation = Conversation(
        Engine(model, tokenizer, EngineConfig(max_running=1)),
        template,
        params,
        model.config.max_positions,
        said_before if system is None else system,
        messages,
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    session = Session(conversation, _write, terminal=terminal)
    try:
        session.run(_typed() if terminal else _piped())
    finally:
        if save is not None:
            conversation.save(save)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _template(tokenizer: Tokenizer, name: str, checkpoint: Path) -> ChatTemplate:
    from trine.engine.errors import DataError
    from trine.engine.text.chat import ChatTemplate
    from trine.engine.text.chat_styles import read_template

    if name.endswith(".jinja"):
        return ChatTemplate(read_template(name), special_tokens=tokenizer.special_tokens)
    template = ChatTemplate.of(tokenizer, name)
    if template is None:
        raise DataError(
            f"{checkpoint} has no chat template, so it was not made to chat; give one by --chat-template FILE.jinja, "
            "or complete text with trine generate"
        )
    return template


def _typed() -> Iterator[str]:
    """Lines from a person, with history and editing; three double quotes begin and end a text of several lines."""
    import readline  # noqa: F401  (gives `input` its editing)

    interrupted = False
    while True:
        try:
            line = input("\n> ")
            if line.strip().startswith('"""'):
                parts = [line.strip()[3:]]
                while not parts[-1].rstrip().endswith('"""'):
                    parts.append(input(". "))
                line = "\n".join(parts).rstrip()[:-3]
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if interrupted:
                print()
                return
            print("\n(Ctrl-C again, Ctrl-D or /exit ends the conversation)")
            interrupted = True
            continue
        interrupted = False
        yield line


def _piped() -> Iterator[str]:
    from trine.engine.errors import DataError

    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"stdin:{number}: the line is not UTF-8 ({error.reason}); convert it") from None
