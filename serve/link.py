"""The API process's side of the socket: it starts the engine process, hands requests over and gives answers to calls.

The socket lies in a new folder that only this user can enter (0700) and has mode 0600; who connects must be the process
that was started, as the kernel says, and then nobody else can. States:

    starting -> ready -> dead          `failure` says why it died; every open call fails with it
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from trine.engine.errors import TrineError
from trine.serve.call import Call
from trine.serve.errors import ApiError, of_refusal, unavailable
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
    unpack_to_server,
)

CONNECT_SECONDS = 60.0
STOP_SECONDS = 5.0
EXIT_SECONDS = 1.0
RETRY_AFTER_DEATH = 10


class EngineLink:
    """One engine process and the calls that wait for it.

    Args:
        command: starts the engine process; the path of the socket is added to it.
        on_delta: told of every delta of an open call, before the call gets it; for the metrics.
    """

    def __init__(self, command: Sequence[str], *, on_delta: Callable[[Call, Delta], None]) -> None:
        self.stats = Stats()
        self.ready: Ready | None = None
        self.failure: str | None = None
        self.exit_status = 0
        self._command = tuple(command)
        self._on_delta = on_delta
        self._calls: dict[str, Call] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._num_pings = self._num_changes = 0
        self._changes: dict[int, asyncio.Future[str | None]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Of the engine process."""
        return None if self._process is None else self._process.pid

    async def start(self, start: Start) -> Ready:
        """Start the process and wait until it has loaded. Raises `EngineDeadError` where it cannot."""
        folder = Path(tempfile.mkdtemp(prefix="trine-serve-"))
        try:
            await self._connect(folder / "engine.sock")
        finally:
            shutil.rmtree(folder)  # the connection stays; nothing else can connect
        self._send(start)
        message = await self._receive()
        if not isinstance(message, Ready):
            raise self._die(message.error if isinstance(message, Failed) else None, message)
        self.ready = message
        return message

    async def run(self) -> None:
        """Give what the engine sends to the calls, until it stops as asked. Raises `EngineDeadError` at another end."""
        while True:
            message = await self._receive()
            if isinstance(message, Step):
                self.stats = message.stats
                for delta in message.deltas:
                    self._deliver(delta)
            elif isinstance(message, Refused):
                if call := self._calls.get(message.id):
                    call.fail(of_refusal(message))
            elif isinstance(message, Pong):
                if future := self._pings.pop(message.number, None):
                    future.set_result(None)
            elif isinstance(message, AdapterChanged):
                if change := self._changes.pop(message.number, None):
                    change.set_result(message.error)
            elif self._stopping:
                return
            else:
                raise self._die(message.error if isinstance(message, Failed) else None, message)

    async def submit(self, call: Call, requests: Sequence[Submit | Pool]) -> None:
        """Hand over a call's requests, and wait where the engine is behind in reading."""
        self._check_alive()
        for request in requests:
            self._calls[request.id] = call
            self._send(request)
        assert self._writer is not None
        with contextlib.suppress(ConnectionError):  # `run` finds the end of the socket and fails the call
            await self._writer.drain()

    def abort(self, request_id: str) -> None:
        """Forget a request, here and in the engine."""
        if self._calls.pop(request_id, None) is not None and self.failure is None:
            self._send(Abort(id=request_id))

    def release(self, call: Call) -> None:
        """The call has ended: its requests are known no more."""
        call.close()
        for request_id in call.ids:
            self._calls.pop(request_id, None)

    def fail_all(self, error: ApiError) -> None:
        """End every open call with an error."""
        for call in set(self._calls.values()):
            call.fail(error)

    async def answers(self, seconds: float) -> bool:
        """Whether the loop that computes answers within `seconds`."""
        if self.ready is None or self.failure is not None:
            return False
        self._num_pings += 1
        number = self._num_pings
        self._pings[number] = future = asyncio.get_running_loop().create_future()
        self._send(Ping(number=number))
        try:
            async with asyncio.timeout(seconds):
                await future
        except TimeoutError:
            return False
        finally:
            self._pings.pop(number, None)
        return self.failure is None

    async def load_adapter(self, name: str, folder: str) -> str | None:
        """Load an adapter; returns why it cannot be, if so. Raises `ApiError` where the engine is gone."""
        return await self._change(lambda number: LoadAdapter(number=number, name=name, folder=folder))

    async def unload_adapter(self, name: str) -> str | None:
        """Forget an adapter; otherwise as `load_adapter`."""
        return await self._change(lambda number: UnloadAdapter(number=number, name=name))

    async def _change(self, make: Callable[[int], ToEngine]) -> str | None:
        self._check_alive()
        self._num_changes += 1
        number = self._num_changes
        # Popped when the answer comes, whether or not its client still waits.
        change: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._changes[number] = change
        self._send(make(number))
        error = await asyncio.shield(change)
        self._check_alive()
        return error

    async def stop(self) -> None:
        """End the process: by a message, and by force where it does not listen."""
        self._stopping = True
        if self._process is None:
            return
        if self.ready is None:
            self._process.kill()  # it is loading, and does not listen
        elif self.failure is None:
            self._send(Stop())
        try:
            await asyncio.wait_for(asyncio.to_thread(self._process.wait, STOP_SECONDS), STOP_SECONDS + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._writer is not None:
            self._writer.close()

    async def _connect(self, path: Path) -> None:
        """Listen, start the process, take its connection and no other."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(1)
            listener.setblocking(False)
            # A session of its own: Ctrl-C at the terminal reaches the API process alone, which drains.
            self._process = subprocess.Popen(
                [*self._command, str(path)], stdin=subprocess.DEVNULL, start_new_session=True
            )
            connection = await self._accept(listener)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=connection)

    async def _accept(self, listener: socket.socket) -> socket.socket:
        assert self._process is not None
        loop = asyncio.get_running_loop()
        accepting = asyncio.ensure_future(loop.sock_accept(listener))
        deadline = loop.time() + CONNECT_SECONDS
        while not accepting.done():
            await asyncio.wait([accepting], timeout=0.05)
            if not accepting.done() and (self._process.poll() is not None or loop.time() > deadline):
                accepting.cancel()
                raise self._die(None, None)
        connection, _ = accepting.result()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        if (pid, uid) != (self._process.pid, os.getuid()):
            connection.close()
            raise self._die(f"process {pid} of user {uid} connected in place of the engine", None)
        return connection

    def _send(self, message: ToEngine) -> None:
        assert self._writer is not None
        self._writer.write(pack(message))

    async def _receive(self) -> ToServer | None:
        """The next message; None at the end of the socket."""
        assert self._reader is not None
        try:
            header = await self._reader.readexactly(LENGTH_BYTES)
            return unpack_to_server(await self._reader.readexactly(body_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except ProtocolError as error:
            return Failed(error=str(error))

    def _deliver(self, delta: Delta) -> None:
        call = self._calls.get(delta.id)
        if call is not None:  # else it was aborted while this was on its way
            self._on_delta(call, delta)
            call.put(delta)

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise unavailable(self.failure, "engine_died", RETRY_AFTER_DEATH)

    def _die(self, reason: str | None, message: object) -> EngineDeadError:
        """Note why the engine is gone, and fail every open call."""
        assert self._process is not None
        if reason is None and message is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS)
            reason = f"the engine process {_how_it_ended(self._process.poll())}"
        elif reason is None:
            reason = f"the engine process sent a {type(message).__name__} where none belongs"
        self.failure = reason
        self.exit_status = message.exit_status if isinstance(message, Failed) else 1
        self.fail_all(unavailable(reason, "engine_died", RETRY_AFTER_DEATH))
        waiting: list[asyncio.Future[None] | asyncio.Future[str | None]] = [
            *self._pings.values(),
            *self._changes.values(),
        ]
        for future in waiting:
            if not future.done():
                future.set_result(None)
        return EngineDeadError(reason, self.exit_status)


class EngineDeadError(TrineError):
    """The engine process ended, or cannot be talked to."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "closed its socket"
    if status < 0:
        hint = "; is there enough memory?" if -status == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-status).name}{hint}"
    return f"ended with exit status {status}"
