"""A conversation with a model: the turns so far, and the next answer as it comes.

Every answer renders the whole conversation by the model's chat template; the engine finds what it has computed before
in its cache. Where the conversation has outgrown the model's context, the oldest turns are left out of what is rendered
(never of what is kept or saved).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from trine.engine.errors import ContextLengthError, DataError, StorageError, TrineError, UsageError
from trine.engine.generate.engine import Engine
from trine.engine.generate.records import GenerationRequest
from trine.engine.generate.sampling import SamplingParams
from trine.engine.text.assistant import turn_end
from trine.engine.text.chat import ChatTemplate

FORMAT = "trine conversation 1"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said. `forgotten`: turns that were left out for want of room; `cached`: prompt tokens found."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    forgotten: int
    seconds: float


def read_conversation(path: Path) -> tuple[str | None, list[dict[str, str]]]:
    """System prompt and turns of a conversation that was saved. Raises `DataError` where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"no conversation in {path}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is no conversation that /save wrote (its format should be {FORMAT!r})")
    system, messages = content.get("system"), content.get("messages")
    if not (system is None or isinstance(system, str)) or not _well_formed(messages):
        raise DataError(f"{path} is damaged: turns of user and assistant with text are expected")
    return system, messages


@dataclass(slots=True)
class Conversation:
    """See the module. `messages` are the turns after the system prompt; change `params` and `system` at will.

    context: the model's context in tokens. seeded: how many answers have been drawn, so that each has its own numbers
    while a seed still makes the whole conversation repeatable.
    """

    engine: Engine
    template: ChatTemplate
    params: SamplingParams
    context: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    seeded: int = 0

    def say(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Add what the user says and the answer to it; `on_text` gets the answer's text as it comes.

        Ctrl-C ends the answer where it is. Where an error is raised nothing is added: `UsageError` where the template
        refuses the conversation, `ContextLengthError` where this turn alone is too long.
        """
        turn = {"role": "user", "content": text}
        answer = self._answer([*self.messages, turn], on_text)
        self.messages += [turn, {"role": "assistant", "content": answer.text}]
        return answer

    def retry(self, on_text: Callable[[str], None]) -> Answer:
        """Another answer to the last thing said. Raises `UsageError` where nothing was."""
        if not self.messages:
            raise UsageError("nothing has been said yet")
        answer = self._answer(self.messages[:-1], on_text)
        self.messages[-1] = {"role": "assistant", "content": answer.text}
        return answer

    def undo(self) -> None:
        """Take back the last exchange. Raises `UsageError` where there is none."""
        if not self.messages:
            raise UsageError("nothing has been said yet")
        del self.messages[-2:]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, complete or not at all."""
        content = {"format": FORMAT, "system": self.system, "messages": self.messages}
        aside = path.with_name(f".{path.name}.partial")
        try:
            aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            raise StorageError(f"the conversation cannot be saved: {error}; give another file") from None

    def load(self, path: Path) -> None:
        """Take over a conversation that was saved. Raises `DataError`, and keeps the present one, where it is none."""
        self.system, self.messages = read_conversation(path)

    def _answer(self, messages: list[dict[str, str]], on_text: Callable[[str], None]) -> Answer:
        ids, forgotten = self._prompt(messages)
        seed = None if self.params.seed is None else self.params.seed + self.seeded
        room = min(self.params.max_tokens, self.context - len(ids))
        params = replace(self.params, seed=seed, max_tokens=room, stop_ids=self._stop_ids())
        self.seeded += 1
        began = time.perf_counter()
        self.engine.add(GenerationRequest(id="chat", prompt_ids=tuple(ids), params=params))
        parts: list[str] = []
        reason, tokens, cached = "interrupted", 0, 0
        try:
            while self.engine.has_work:
                for output in self.engine.step():
                    if output.error is not None:
                        raise TrineError(f"the answer failed: {output.error}")
                    parts.append(output.text)
                    tokens, cached = output.completion_tokens, output.cached_tokens
                    reason = output.finish_reason or reason
                    if output.text:
                        on_text(output.text)
        except KeyboardInterrupt:
            self.engine.abort("chat")
        return Answer("".join(parts), reason, len(ids), tokens, cached, forgotten, time.perf_counter() - began)

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """Ids of the conversation, and how many turns were left out so that an answer of some length fits."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        wanted = min(self.params.max_tokens, max(self.context // 4, 1))
        for first in range(0, len(messages), 2):
            text = self.template.render([*system, *messages[first:]])
            # The template has written the special tokens already, the first one of the text included.
            ids = self.engine.tokenizer.encode(text)
            if len(ids) + wanted <= self.context:
                return ids, first
        raise ContextLengthError(
            f"what was said has {len(ids)} tokens with the system prompt, and an answer wants {wanted} of the model's "
            f"context of {self.context}; say less, or lower /max-tokens"
        )

    def _stop_ids(self) -> tuple[int, ...]:
        """Models end an answer with the token that the template writes after it, settings or not."""
        end = turn_end(self.template, self.engine.tokenizer)
        return self.params.stop_ids if end is None else (*self.params.stop_ids, end)


def _well_formed(messages: object) -> TypeGuard[list[dict[str, str]]]:
    return (
        isinstance(messages, list)
        and len(messages) % 2 == 0
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] == ROLES[1 + number % 2]
            and isinstance(message["content"], str)
            for number, message in enumerate(messages)
        )
    )
