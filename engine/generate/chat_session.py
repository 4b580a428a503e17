"""What is said in `trine chat`: answers shown as they come, and the `/` commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trine.engine.errors import TrineError, UsageError
from trine.engine.generate.conversation import Answer, Conversation
from trine.engine.log import format_duration, printable, say


class Session:
    """Carries lines to a conversation or to a command; `write` shows what the model says.

    At a terminal errors are shown and the talk goes on, and control characters in answers are shown as escapes.
    """

    def __init__(self, conversation: Conversation, write: Callable[[str], None], *, terminal: bool) -> None:
        self._conversation = conversation
        self._write = write
        self._terminal = terminal
        self._ended = False
        self._name = ""  # of the command under way
        # Name, arguments, what it does, how.
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "system": ("[TEXT]", "set the system prompt, or show it; - removes it", self._system),
            "reset": ("", "forget what was said, keep the system prompt", self._reset),
            "retry": ("", "another answer to the last thing said", lambda _: self._show(self._conversation.retry)),
            "undo": ("", "take back the last exchange", lambda _: self._conversation.undo()),
            "history": ("", "show what was said", self._history),
            "save": ("FILE", "save the conversation", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "temperature": ("X", "0 takes the likeliest token; 1 is the model's distribution", self._set_number),
            "top-p": ("X", "sample among the likeliest tokens that reach this probability", self._set_number),
            "top-k": ("N", "sample among the N likeliest tokens; 0 takes all", self._set_number),
            "min-p": ("X", "leave out tokens below this fraction of the likeliest", self._set_number),
            "max-tokens": ("N", "at most so many tokens an answer", self._set_number),
            "seed": ("N", "make what follows repeatable", self._set_number),
            "exit": ("", "end the conversation (also /quit, Ctrl-D)", self._exit),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Until the lines end or /exit. Raises what goes wrong where nobody is at a terminal to mend it."""
        if self._terminal:
            say("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends the conversation")
        for line in lines:
            try:
                self._take(line)
            except TrineError as error:
                if not self._terminal:
                    raise
                say(str(error))
            if self._ended:
                return

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._show(lambda on_text: self._conversation.say(line, on_text))
            return
        name, _, argument = line[1:].strip().partition(" ")
        name = "exit" if name == "quit" else name
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise UsageError(f"no command /{name}; {hint}")
        wanted, _, action = self._commands[name]
        if argument and not wanted:
            raise UsageError(f"/{name} takes nothing, got {argument.strip()!r}")
        if wanted and not wanted.startswith("[") and not argument:
            raise UsageError(f"/{name} needs {wanted}" + (f"; it is {self._value(name)}" if wanted in "XN" else ""))
        self._name = name
        action(argument.strip())

    def _show(self, ask: Callable[[Callable[[str], None]], Answer]) -> None:
        def show(text: str) -> None:
            self._write(printable(text) if self._terminal else text)

        answer = ask(show)
        self._write("\n")
        if answer.forgotten:
            say(f"(the first {answer.forgotten} turns no longer fit the model's context and were left out)")
        if answer.finish_reason == "length":
            say("(cut off; /max-tokens allows more)")
        if self._terminal:
            rate = answer.completion_tokens / max(answer.seconds, 1e-9)
            say(f"({answer.completion_tokens} tokens in {format_duration(answer.seconds)}, {rate:.1f} tokens/s)")

    def _help(self, _: str) -> None:
        for name, (wanted, what, _action) in self._commands.items():
            say(f"  {f'/{name} {wanted}':<20} {what}")
        say('  """                  begin and end a text of several lines (at a terminal)')

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        else:
            say("no system prompt" if self._conversation.system is None else f"system: {self._conversation.system}")

    def _reset(self, _: str) -> None:
        self._conversation.messages.clear()
        say("forgotten; the system prompt is kept" if self._conversation.system else "forgotten")

    def _history(self, _: str) -> None:
        if self._conversation.system is not None:
            say(f"system: {self._conversation.system}")
        for message in self._conversation.messages:
            say(f"{message['role']}: {printable(message['content'])}")

    def _save(self, name: str) -> None:
        self._conversation.save(Path(name).expanduser())
        say(f"saved {name}")

    def _load(self, name: str) -> None:
        self._conversation.load(Path(name).expanduser())
        say(f"{len(self._conversation.messages)} turns from {name}")

    def _value(self, name: str) -> Any:
        return getattr(self._conversation.params, name.replace("-", "_"))

    def _set_number(self, text: str) -> None:
        kind = int if self._commands[self._name][0] == "N" else float
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(
                f"/{self._name} needs {'a whole number' if kind is int else 'a number'}, got {text!r}"
            ) from None
        key: Any = {self._name.replace("-", "_"): value}
        self._conversation.params = replace(self._conversation.params, **key)
        if self._name == "seed":
            self._conversation.seeded = 0

    def _exit(self, _: str) -> None:
        self._ended = True
