r"""Sending an answer: whole as JSON, or as a stream of server-sent events; and noticing that nobody listens any more.

    data: {chunk}\n\n        one for each piece of each choice
    : \n\n                   a comment after some seconds of silence, so that proxies keep the connection
    data: {"error": ...}\n\n a failure after the first byte, when the status is gone
    data: [DONE]\n\n         the end, also after an error

The status is sent with the first piece, so what fails before it fails with a status of its own. Whatever happens (the
end, an error, a client that goes away or stops reading), the call's open requests are aborted before `__call__` ends.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trine.serve.answers import Answer
from trine.serve.call import Call
from trine.serve.errors import ApiError
from trine.serve.messages import Delta, Logprob
from trine.serve.pooling_answers import PoolingAnswer
from trine.serve.service import Admission, Service

DONE = b"data: [DONE]\n\n"
PING = b": \n\n"


class EngineResponse(Response):
    """The response to one job; it hands the job to the engine when it is called."""

    def __init__(
        self, service: Service, answer: Answer | PoolingAnswer, *, admission: Admission, admitted: int
    ) -> None:
        """`admitted` completions or texts were counted in for it and are counted out at the end."""
        super().__init__()
        self._service = service
        self._answer = answer
        self._admission, self._admitted = admission, admitted
        # Vectors and scores are whole; texts may be streamed.
        self._streamed = answer if isinstance(answer, Answer) and answer.job.body.stream else None
        job = answer.job
        unread = None if self._streamed is None else service.settings.max_unread_tokens * admitted
        self._call = Call([request.id for request in job.requests], job.n, abort=service.link.abort, max_waiting=unread)
        self._outcome = "the client went away"
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client has gone."""
        work = asyncio.ensure_future(self._work(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._service.link.release(self._call)
            self._admission.leave(self._admitted)
            for task in (work, gone):
                task.cancel()
            (failure, _) = await asyncio.gather(work, gone, return_exceptions=True)
            self._service.log(self._call, self._answer.job.id, self._answer.job.body.user, self._outcome)
        if isinstance(failure, Exception) and not isinstance(failure, ClientStalledError):
            raise failure

    async def _work(self, send: Send) -> None:
        try:
            await self._service.link.submit(self._call, self._answer.job.requests)
            if self._streamed is not None:
                await self._stream(send, self._streamed)
            else:
                await self._whole(send)
            usage = self._answer.usage()
            self._outcome = f"{usage['prompt_tokens']} + {usage.get('completion_tokens', 0)} tokens"
        except ApiError as error:
            self._outcome = f"{error.status} {error.code}: {error.message}"
            if self._started:
                await self._send_body(send, _event({"error": msgspec.json.decode(error.body())["error"]}) + DONE)
                await self._send_body(send, b"", more=False)
            else:
                await self._send_start(send, "application/json", error.status, error.headers())
                await self._send_body(send, error.body(), more=False)

    async def _whole(self, send: Send) -> None:
        parts: dict[tuple[str, int], _Parts] = {}
        while not self._call.done:
            for delta in await self._call.take():
                parts.setdefault((delta.id, delta.choice), _Parts()).add(delta)
        body = msgspec.json.encode(self._answer.whole([part.joined() for part in parts.values()]))
        await self._send_start(send, "application/json", 200, {"content-length": str(len(body))})
        await self._send_body(send, body, more=False)

    async def _stream(self, send: Send, answer: Answer) -> None:
        ping = self._service.settings.ping_seconds
        while not self._call.done:
            deltas = await self._call.take(ping)
            if not self._started:
                await self._send_start(send, "text/event-stream; charset=utf-8", 200, {"cache-control": "no-cache"})
            frames = b"".join(_frames(answer, delta) for delta in deltas) if deltas else PING
            if frames:
                await self._send_body(send, frames)
        options = answer.job.body.stream_options
        last = _event(answer.usage_chunk()) if options is not None and options.include_usage else b""
        await self._send_body(send, last + DONE)
        await self._send_body(send, b"", more=False)

    async def _send_start(self, send: Send, kind: str, status: int, headers: dict[str, str]) -> None:
        self._started = True
        named = {"content-type": kind, "x-request-id": self._answer.job.id, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        await self._in_time(send, {"type": "http.response.start", "status": status, "headers": raw})

    async def _send_body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await self._in_time(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _in_time(self, send: Send, message: dict[str, Any]) -> None:
        """Send, or give up on a client that takes nothing."""
        try:
            async with asyncio.timeout(self._service.settings.write_seconds):
                await send(message)
        except TimeoutError:
            self._outcome = "the client stopped reading"
            raise ClientStalledError from None


class ClientStalledError(Exception):
    """A client took nothing for so long that its connection is closed."""


class _Parts:
    """The deltas of one choice on their way to be one."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[Logprob] = []
        self._prompt_logprobs: list[Logprob | None] | None = None
        self._last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._ids += delta.token_ids
        self._logprobs += delta.logprobs
        self._prompt_logprobs = self._prompt_logprobs or delta.prompt_logprobs
        self._last = delta

    def joined(self) -> Delta:
        assert self._last is not None
        return msgspec.structs.replace(
            self._last,
            text="".join(self._texts),
            token_ids=self._ids,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _frames(answer: Answer, delta: Delta) -> bytes:
    """The events of one piece."""
    options = answer.job.body.stream_options
    answer.count(delta)
    with_usage = options is not None and bool(options.include_usage)
    usage = answer.usage() if with_usage and options is not None and options.continuous_usage_stats else None
    frames = b""
    if (opening := answer.opening(delta)) is not None:
        frames = _event({**opening, "usage": usage} if with_usage else opening)
    if answer.says_something(delta):
        frames += _event(answer.chunk(delta, usage, with_usage=with_usage))
    return frames


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
