"""A server from start to end: the socket, the engine process, signals, draining, the exit status.

listen        at once, so that a taken port is said before a model is loaded; /health answers, /ready does not
load          the engine process, and the tokenizer here
serve         until SIGTERM, Ctrl-C or the death of the engine process
drain         /ready and new requests get 503; what is on its way may end within `drain_seconds`; then the rest is
              cut off with an error. A second signal does not wait.
end           0 after SIGTERM, 130 after Ctrl-C, 1 where the engine process died
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from trine.engine.errors import TrineError, UsageError
from trine.engine.log import say, warn
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer
from trine.serve.app import make_app
from trine.serve.errors import unavailable
from trine.serve.link import EngineDeadError
from trine.serve.messages import Ready
from trine.serve.service import RETRY_WHILE_ENDING, Service
from trine.serve.settings import ServerSettings

ENGINE_COMMAND = (sys.executable, "-m", "trine.serve.engine_process")
INTERRUPTED = 130
# After the engine's death: time for what waits to be told, and for who comes now.
LAST_WORDS_SECONDS = 1.0
# After a drain: time for the last bytes to leave.
CLOSE_SECONDS = 2


def serve(
    settings: ServerSettings,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serve until a signal comes; returns the exit status.

    Args:
        settings: what and how.
        engine_command: starts the engine process; the path of a socket is added.
        on_ready: called with the address (`http://127.0.0.1:8000`) when requests are taken.

    Raises `TrineError` where the server cannot start: the port is taken, the model cannot be loaded.
    """
    with _listen(settings) as listener:
        return asyncio.run(_Run(settings, engine_command, on_ready).run(listener))


class _Run:
    def __init__(
        self, settings: ServerSettings, engine_command: Sequence[str], on_ready: Callable[[str], None] | None
    ) -> None:
        self._settings = settings
        self._service = Service(settings, engine_command)
        self._on_ready = on_ready
        self._signals: list[int] = []
        self._signalled = asyncio.Event()
        config = uvicorn.Config(
            make_app(self._service),
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        self._http = _Http(config)

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.ensure_future(self._http.serve(sockets=[listener]))
        address = _address(self._settings.host, listener)
        say(f"listening on {address}; loading the model")
        working = asyncio.ensure_future(self._work(address))
        signalled = asyncio.ensure_future(self._signalled.wait())
        try:
            await asyncio.wait({serving, working, signalled}, return_when=asyncio.FIRST_COMPLETED)
            status = await (self._drain() if signalled.done() else self._last_words(working))
        finally:
            for task in (working, signalled):
                task.cancel()
            await asyncio.gather(working, signalled, return_exceptions=True)
            await self._service.link.stop()
            self._http.should_exit = True
            await serving
        return status

    async def _work(self, address: str) -> None:
        """Load, then carry what the engine sends."""
        ready = await self._service.link.start(self._settings.start)
        await asyncio.to_thread(self._load, ready)
        self._announce(address, ready)
        await self._service.link.run()

    def _load(self, ready: Ready) -> None:
        tokenizer = Tokenizer.load(ready.folder)
        template = ChatTemplate.of(tokenizer)
        _ = tokenizer.token_bytes, tokenizer.special_ids  # computed now, not by the first request
        self._service.load(tokenizer, template, ready)

    def _announce(self, address: str, ready: Ready) -> None:
        if self._settings.host not in ("127.0.0.1", "localhost", "::1") and not self._settings.api_keys:
            warn(f"anybody who reaches {address} can use this server; set --api-key-file, or listen on 127.0.0.1")
        names = (*self._settings.names, *self._service.adapters)
        say(f"serving {', '.join(names)} at {address}/v1 (context {ready.context_len}, Ctrl-C ends)")
        if self._on_ready is not None:
            self._on_ready(address)

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._signalled.set()

    async def _drain(self) -> int:
        service, seconds = self._service, self._settings.drain_seconds
        service.ending = True
        if service.in_flight:
            say(f"draining: {service.under_way} may end within {seconds:g} s; a second signal does not wait")
        deadline = asyncio.get_running_loop().time() + seconds
        while service.in_flight and len(self._signals) < 2 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if service.in_flight:
            say(f"{service.under_way} are cut off")
            service.link.fail_all(unavailable("the server is shutting down", "shutting_down", RETRY_WHILE_ENDING))
            await asyncio.sleep(0.1)
        if service.link.failure is not None:
            say(f"trine: {service.link.failure}, while draining")
            return 1
        return INTERRUPTED if self._signals[0] == signal.SIGINT else 0

    async def _last_words(self, working: asyncio.Future[None]) -> int:
        """The engine is gone, or never came."""
        error = working.exception() if working.done() else None
        if not isinstance(error, EngineDeadError):
            raise error or TrineError("the HTTP server ended by itself")
        if self._service.link.ready is None:
            raise UsageError(str(error)) if error.status == 2 else TrineError(str(error))
        say(f"trine: {error}; the server ends")
        await asyncio.sleep(LAST_WORDS_SECONDS)
        return 1


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: when to end is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def _listen(settings: ServerSettings) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(
            f"cannot listen on {settings.host!r}: {error.strerror}; give an address of this machine"
        ) from None
    family, _, _, _, address = found[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        where = f"{settings.host}:{settings.port}"
        raise TrineError(f"cannot listen on {where}: {reason}; give another --host or --port") from None


def _address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def default_name(checkpoint: Path) -> str:
    """What a model is called where nobody says: as its folder, or for a run's `final/` or step as the run."""
    folder = checkpoint.resolve()
    inside_run = folder.name == "final" or folder.name.startswith("step-")
    return folder.parent.name if inside_run and folder.parent.name else folder.name
