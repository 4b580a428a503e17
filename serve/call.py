"""The outputs of one HTTP request on their way from the engine to its client: few, and never more than that.

What the engine sends waits here until the client's side takes it. Waiting deltas of one choice become one, so a slow
reader gets larger pieces, not more of them; and when more than `max_waiting` tokens wait, the client is too slow: its
requests are aborted and the call fails. So a client that stops reading costs a fixed amount of memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from trine.serve.errors import ApiError
from trine.serve.messages import Delta


class Call:
    """One HTTP request: its prompts are engine requests `ids`, each with `n` choices.

    Args:
        ids: of its engine requests, in the order of the prompts.
        n: choices of each.
        abort: called with the id of each engine request that nobody waits for any more.
        max_waiting: tokens that may wait; None for a call whose reader is this process.
    """

    def __init__(
        self, ids: Sequence[str], n: int, *, abort: Callable[[str], None], max_waiting: int | None = None
    ) -> None:
        self.ids = tuple(ids)
        self.n = n
        self.started = time.monotonic()
        self.first_token: dict[str, float] = {}  # engine request -> when its first token came
        self.last_token: dict[tuple[str, int], float] = {}
        self._abort = abort
        self._max_waiting = max_waiting
        self._open = {(request_id, choice) for request_id in ids for choice in range(n)}
        self._waiting: dict[tuple[str, int], Delta] = {}
        self._waiting_tokens = 0
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether every choice has ended and all was taken. A call that failed is not done: `take` raises."""
        return not self._open and not self._waiting and self._error is None

    def put(self, delta: Delta) -> None:
        """From the engine."""
        key = (delta.id, delta.choice)
        if self._error is not None or key not in self._open:
            return
        if delta.finish_reason == "error":
            self._open.discard(key)
            self._end(ApiError(500, delta.error or "the engine failed on this request", code="generation_failed"))
            return
        if delta.finish_reason is not None:
            self._open.discard(key)
        waiting = self._waiting.get(key)
        self._waiting[key] = delta if waiting is None else _joined(waiting, delta)
        self._waiting_tokens += len(delta.token_ids)
        if self._max_waiting is not None and self._waiting_tokens > self._max_waiting:
            limit = self._max_waiting
            self._end(ApiError(500, f"the client left more than {limit} tokens unread", code="client_too_slow"))
            return
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End the call, unless it is done: what waits is dropped, what is left is aborted, and `take` raises."""
        if not self.done and self._error is None:
            self._end(error)

    async def take(self, timeout: float | None = None) -> list[Delta]:
        """Wait for news: at most one delta per choice; none after `timeout` seconds. Raises the call's `ApiError`."""
        if not self._news.is_set():
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return []
        self._news.clear()
        if self._error is not None:
            self._news.set()
            raise self._error
        deltas = list(self._waiting.values())
        self._waiting.clear()
        self._waiting_tokens = 0
        return deltas

    def close(self) -> None:
        """Nobody waits any more: abort what is not finished."""
        self._abort_open()

    def _end(self, error: ApiError) -> None:
        self._error = error
        self._waiting.clear()
        self._waiting_tokens = 0
        self._abort_open()
        self._news.set()

    def _abort_open(self) -> None:
        for request_id in dict.fromkeys(request_id for request_id, _ in sorted(self._open)):
            self._abort(request_id)
        self._open.clear()


def _joined(first: Delta, second: Delta) -> Delta:
    """Two deltas of one choice as one."""
    return msgspec.structs.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
    )
