"""The engine's side of the socket: one loop that takes messages and computes steps in turn.

    take what has come  ->  Submit: add, Abort: abort, ...: answer  ->  one step  ->  one frame with all it brought

A thread reads frames into a queue of fixed size; when that is full it reads no more, and the socket makes the API
process wait. When the API process goes away, in whatever way, the kernel ends this process on Linux, and the end of the
socket does elsewhere. A request that the engine does not take is refused alone; an error of a step is one of the
engine, ends the process, and is said first.

The loop knows an engine by the few things in `Computes`; `trine.serve.engine_process` puts the real one in.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from trine.engine.errors import ContextLengthError, GrammarError, QueueFullError, TrineError, UsageError
from trine.engine.log import say
from trine.serve.messages import (
    LENGTH_BYTES,
    Abort,
    AdapterChanged,
    Delta,
    Failed,
    LoadAdapter,
    Ping,
    Pong,
    Pool,
    ProtocolError,
    Ready,
    Refused,
    Start,
    Stats,
    Step,
    Stop,
    Submit,
    ToEngine,
    ToServer,
    UnloadAdapter,
    body_length,
    pack,
    unpack_to_engine,
)
from trine.serve.parent import end_with_parent

INBOX_MESSAGES = 1024
# How long a step may still take when the API process is gone.
ORPHAN_SECONDS = 5.0


class Computes(Protocol):
    """An engine, in messages."""

    def add(self, request: Submit | Pool) -> None:
        """Take a request, or raise a `TrineError` and have changed nothing."""

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ones are fine."""

    def step(self) -> list[Delta]:
        """Compute one step for all requests."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def stats(self) -> Stats:
        """Between two steps."""

    def load_adapter(self, name: str, folder: str) -> None:
        """Lend an adapter to requests, or raise a `TrineError` and have changed nothing."""

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, or raise a `TrineError`."""


Load = Callable[[Start], tuple[Computes, Ready]]


def connect(path: str) -> socket.socket:
    """The socket that the API process, which started this one, listens on."""
    end_with_parent()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    return connection


def work(connection: socket.socket, load: Load) -> int:
    """Load, then compute until `Stop` or the end of the socket; returns the exit status."""
    inbox: queue.Queue[ToEngine | None] = queue.Queue(INBOX_MESSAGES)
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    try:
        start = inbox.get()
        if not isinstance(start, Start):
            return 0  # the API process went away before it asked for anything
        try:
            engine, ready = load(start)
        except TrineError as error:
            _send(connection, Failed(error=str(error), exit_status=error.exit_status))
            return error.exit_status
        _send(connection, ready)
        return _loop(connection, inbox, engine)
    except (BrokenPipeError, ConnectionResetError):
        return 0


def _loop(connection: socket.socket, inbox: queue.Queue[ToEngine | None], engine: Computes) -> int:
    while True:
        # With work to do, take what is there; without, wait for something to come.
        if not engine.has_work or not inbox.empty():
            message = inbox.get()
            if message is None or isinstance(message, Stop):
                return 0
            reply = _take(engine, message)
            if reply is not None:
                _send(connection, reply)
            continue
        try:
            deltas = engine.step()
        except Exception as error:
            # Of the engine, not of one request: nothing it holds can be trusted any more. Say why, then end.
            _send(connection, Failed(error=f"a step failed: {type(error).__name__}: {error}"))
            raise
        _send(connection, Step(deltas=deltas, stats=engine.stats()))


def _take(engine: Computes, message: ToEngine) -> ToServer | None:
    """Act on one message; returns what there is to answer."""
    if isinstance(message, Submit | Pool):
        return _add(engine, message)
    if isinstance(message, Abort):
        engine.abort(message.id)
        return None if engine.has_work else Step(deltas=[], stats=engine.stats())
    if isinstance(message, Ping):
        return Pong(number=message.number)
    if isinstance(message, LoadAdapter | UnloadAdapter):
        return _change_adapters(engine, message)
    raise ProtocolError(f"{type(message).__name__} came after the start")


def _change_adapters(engine: Computes, message: LoadAdapter | UnloadAdapter) -> AdapterChanged:
    try:
        if isinstance(message, LoadAdapter):
            engine.load_adapter(message.name, message.folder)
        else:
            engine.unload_adapter(message.name)
    except TrineError as error:
        return AdapterChanged(number=message.number, error=str(error))
    except Exception as error:
        # A mistake of ours that this adapter brings out; requests go on.
        say(f"a change of adapters failed: {type(error).__name__}: {error}")
        return AdapterChanged(number=message.number, error=f"the engine failed on this adapter: {error}")
    return AdapterChanged(number=message.number)


def _add(engine: Computes, request: Submit | Pool) -> Refused | None:
    try:
        engine.add(request)
    except GrammarError as error:
        field = request.guide.field if isinstance(request, Submit) and request.guide else None
        return Refused(id=request.id, reason="invalid", error=str(error), field=field)
    except UsageError as error:
        return Refused(id=request.id, reason="invalid", error=str(error))
    except ContextLengthError as error:
        return Refused(id=request.id, reason="too_long", error=str(error))
    except QueueFullError as error:
        return Refused(id=request.id, reason="full", error=str(error))
    except Exception as error:
        # A mistake of ours that this request brings out: it must not take the others with it.
        say(f"request {request.id} failed on arrival: {type(error).__name__}: {error}")
        engine.abort(request.id)
        return Refused(id=request.id, reason="internal", error=f"the engine failed on this request: {error}")
    return None


def _send(connection: socket.socket, message: ToServer) -> None:
    connection.sendall(pack(message))


def _read(connection: socket.socket, inbox: queue.Queue[ToEngine | None]) -> None:
    """Frames into the queue, and None at the end of the socket or at something that is no frame."""
    with connection.makefile("rb") as stream:
        try:
            while len(header := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
                inbox.put(unpack_to_engine(stream.read(body_length(header))))
        except (ProtocolError, OSError) as error:
            say(f"the engine process stops: {error}")
    with contextlib.suppress(queue.Full):
        inbox.put(None, timeout=ORPHAN_SECONDS)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)  # still here: a step does not end, and nobody waits for it
