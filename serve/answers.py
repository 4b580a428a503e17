"""What is sent back: JSON objects of the two APIs, whole or in chunks, from the deltas of an engine's request.

    text_completion          "choices": [{"index", "text",    "logprobs", "finish_reason", ...}]     whole or a chunk
    chat.completion          "choices": [{"index", "message", "logprobs", "finish_reason", ...}]
    chat.completion.chunk    "choices": [{"index", "delta",   "logprobs", "finish_reason", ...}]

Choices are numbered over the prompts: prompt 0 has 0 to n - 1. One class for each API knows its layout; what both share
(ids, counts, usage) is in `Answer`. A choice is written from a delta, whether that is a piece or all of it.
"""

from __future__ import annotations

import time
from typing import Any

from trine.serve.jobs import Job
from trine.serve.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from trine.serve.messages import Delta, Logprob
from trine.serve.schemas import CompletionBody
from trine.serve.service import Loaded


class Answer:
    """The reply to one job; `Answer.to(job)` picks the layout."""

    whole_object = ""
    chunk_object = ""

    def __init__(self, job: Job, loaded: Loaded, model: str) -> None:
        self.job = job
        self.loaded = loaded
        self._head = {"id": job.id, "created": int(time.time()), "model": model}
        self._prompt_tokens = sum(len(request.prompt_ids) for request in job.requests)
        self._prompt_numbers = {request.id: number for number, request in enumerate(job.requests)}
        self._completion_tokens: dict[int, int] = {}
        self._cached_tokens: dict[str, int] = {}

    @staticmethod
    def to(job: Job, loaded: Loaded, model: str) -> Answer:
        """The answer in the layout that the job's API has."""
        kind = CompletionAnswer if isinstance(job.body, CompletionBody) else ChatAnswer
        return kind(job, loaded, model)

    def index(self, delta: Delta) -> int:
        """The number of the delta's choice in the answer."""
        return self._prompt_numbers[delta.id] * self.job.n + delta.choice

    def count(self, delta: Delta) -> None:
        """Keep the counts for `usage`."""
        self._completion_tokens[self.index(delta)] = delta.completion_tokens
        self._cached_tokens.setdefault(delta.id, delta.cached_tokens)

    def usage(self) -> dict[str, Any]:
        """Tokens so far; each prompt counts once, whatever n is."""
        completion_tokens = sum(self._completion_tokens.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The answer in one object, from one delta for each choice."""
        for delta in deltas:
            self.count(delta)
        choices = [self._choice(delta, whole=True) for delta in sorted(deltas, key=self.index)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    def chunk(self, delta: Delta, usage: dict[str, Any] | None, *, with_usage: bool) -> dict[str, Any]:
        """A piece of one choice."""
        choice = self._choice(delta, whole=False)
        extra = {"usage": usage} if with_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **extra}

    def says_something(self, delta: Delta) -> bool:
        """Whether a piece is worth a chunk: one without text (half a character) is not, unless its ids are wanted."""
        wants_ids = self.job.body.return_token_ids or delta.logprobs
        return bool(delta.text or delta.finish_reason or wants_ids or delta.prompt_logprobs)

    def opening(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk that goes before the first piece of a choice, if there is one."""
        return None

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage()}

    def _choice(self, delta: Delta, *, whole: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _extras(self, delta: Delta) -> dict[str, Any]:
        """Fields of a choice that go beyond OpenAI's, where they were asked for or say something."""
        body, extras = self.job.body, dict[str, Any]()
        if delta.finish_reason is not None:
            extras["stop_reason"] = delta.stop_reason
        if body.return_token_ids:
            extras["token_ids"] = delta.token_ids
            if delta.completion_tokens == len(delta.token_ids):  # the first piece
                extras["prompt_token_ids"] = self.job.requests[self._prompt_numbers[delta.id]].prompt_ids
        if body.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(
                self.loaded.names, [_cut(entry, body.prompt_logprobs) for entry in delta.prompt_logprobs]
            )
        return extras


class CompletionAnswer(Answer):
    """/v1/completions."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, job: Job, loaded: Loaded, model: str) -> None:
        super().__init__(job, loaded, model)
        assert isinstance(job.body, CompletionBody)
        self._body = job.body
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._echoed: set[int] = set()

    def count(self, delta: Delta) -> None:
        """As for every answer; the one token computed for an echo alone is not part of it."""
        super().count(delta)
        if self._body.max_tokens == 0:
            self._completion_tokens[self.index(delta)] = 0

    def _choice(self, delta: Delta, *, whole: bool) -> dict[str, Any]:
        index, finish_reason = self.index(delta), delta.finish_reason
        text, ids, logprobs = delta.text, list(delta.token_ids), list[Logprob | None](delta.logprobs)
        if self._body.max_tokens == 0:
            text, ids, logprobs = "", [], []
            finish_reason = "length" if finish_reason is not None else None
        extras = self._extras(delta)
        if self._body.echo and index not in self._echoed:
            self._echoed.add(index)
            prompt_ids, prompt_text = self._prompt(delta)
            text, ids = prompt_text + text, prompt_ids + ids
            wanted = self._body.logprobs or 0
            logprobs = [_cut(entry, wanted) for entry in delta.prompt_logprobs or ()] + logprobs
        found = None
        if self._body.logprobs is not None:
            found = self._writer(index).piece(ids, logprobs)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish_reason, **extras}

    def _prompt(self, delta: Delta) -> tuple[list[int], str]:
        number = self._prompt_numbers[delta.id]
        ids, text = self.job.requests[number].prompt_ids, self.job.texts[number]
        if text is None:
            skip = self._body.skip_special_tokens is not False
            text = self.loaded.tokenizer.decode(ids, skip_special_tokens=skip)
        return list(ids), text

    def _writer(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(
                self.loaded.names,
                as_ids=bool(self._body.return_tokens_as_token_ids),
                skip_special_tokens=self._body.skip_special_tokens is not False,
            )
        return self._logprobs[index]


class ChatAnswer(Answer):
    """/v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, job: Job, loaded: Loaded, model: str) -> None:
        super().__init__(job, loaded, model)
        self._opened: set[int] = set()

    def opening(self, delta: Delta) -> dict[str, Any] | None:
        """The role comes in a chunk of its own, once for each choice."""
        index = self.index(delta)
        if index in self._opened:
            return None
        self._opened.add(index)
        role = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": index, "delta": role, "logprobs": None, "finish_reason": None}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def _choice(self, delta: Delta, *, whole: bool) -> dict[str, Any]:
        found = None
        # OpenAI's streams have logprobs null in chunks without tokens.
        if delta.logprobs:
            as_ids = bool(self.job.body.return_tokens_as_token_ids)
            found = chat_logprobs(self.loaded.names, delta.logprobs, as_ids=as_ids)
        said: dict[str, Any]
        if whole:
            said = {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        else:
            said = {"delta": {"content": delta.text} if delta.text or delta.finish_reason is None else {}}
        index = self.index(delta)
        return {
            "index": index,
            **said,
            "logprobs": found,
            "finish_reason": delta.finish_reason,
            **self._extras(delta),
        }


def _cut(entry: Logprob | None, count: int) -> Logprob | None:
    """With at most `count` of the likeliest ids: more were computed where echo and prompt_logprobs ask differently."""
    return (
        entry
        if entry is None or len(entry.top) <= count
        else Logprob(entry.id, entry.logprob, entry.rank, entry.top[:count])
    )
