"""Real servers as processes on free ports of the loopback: one around a tiny model for a session, and scripted ones.

Every server is ended by its fixture, and its exit status is looked at.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SECONDS = 120.0  # for what takes a moment on an idle machine


class Server:
    """A server process: its address, what it said, how it ends."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
        )
        self.said: list[str] = []
        self.port = 0
        self._news = threading.Condition()
        self._opened: list[http.client.HTTPConnection | http.client.HTTPResponse] = []
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._news:
                    self.said.append(line.rstrip("\n"))
                    self._news.notify_all()
        self.process.wait()
        with self._news:
            self._news.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The first line it says that matches."""
        with self._news:
            found = self._news.wait_for(lambda: self._find(pattern) or self.process.poll() is not None, SECONDS)
        line = self._find(pattern)
        assert found, "\n".join(self.said)
        assert line, "\n".join(self.said)
        return line

    def _find(self, pattern: str) -> str | None:
        return next((line for line in self.said if re.search(pattern, line)), None)

    def wait_until(self, what: str) -> None:
        """`listening` or `serving`; then its port is known."""
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.wait_for(f"^{what} "))
        assert found
        self.port = int(found[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is closed at the end at the latest."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        self._opened.append(connection)
        return connection

    def send(self, **fields: Any) -> http.client.HTTPConnection:
        """A completions request whose answer nobody has read yet."""
        connection = self.connect()
        connection.request("POST", "/v1/completions", json.dumps(fields))
        return connection

    def stream(self, **fields: Any) -> http.client.HTTPResponse:
        """A stream of which the status and headers have come; its `hang_up()` leaves."""
        connection = self.send(stream=True, **fields)
        response = connection.getresponse()
        response.hang_up = lambda: _hang_up(connection, response)  # type: ignore[attr-defined]
        self._opened.append(response)
        return response

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (read as JSON where it is), headers. `body` bytes go as they are, else as JSON."""
        connection = self.connect()
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
            response = connection.getresponse()
            text = response.read()
            given = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        is_json = given.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text.decode(), given

    def complete(self, **fields: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        status, answer, _ = self.ask("/v1/completions", fields)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(SECONDS)
        self._listening.join(SECONDS)  # stderr ends when the engine process has ended too
        return status

    def kill(self) -> None:
        """Whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for opened in self._opened:
            opened.close()


def _hang_up(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    response.close()


@pytest.fixture(scope="session")
def chat_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` with a chat template."""
    folder = tmp_path_factory.mktemp("serve") / "tiny-chat"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server_class() -> type[Server]:
    """For a server with options of a test's own."""
    return Server


@pytest.fixture(scope="session")
def server(chat_checkpoint: Path) -> Iterator[Server]:
    """`trine serve` on the tiny model; called `tiny` and `also-tiny`."""
    command = [sys.executable, "-m", "trine.cli", "serve", str(chat_checkpoint), "--port", "0", "--log-requests"]
    names = ["--served-model-name", "tiny", "--served-model-name", "also-tiny"]
    running = Server([*command, *names])
    try:
        running.wait_until("serving")
        yield running
        assert running.end() == 0, "\n".join(running.said)
    finally:
        running.kill()


class Scripted(Server):
    """A server around the scripted engine, and what that engine wrote down."""

    def __init__(self, log: Path, checkpoint: Path, step_seconds: float, device: str, settings: dict[str, Any]) -> None:
        self._log = log
        settings = {"start": {"checkpoint": str(checkpoint), "device": device}, **settings}
        script = Path(__file__).with_name("scripted_server.py")
        super().__init__([sys.executable, str(script), json.dumps(settings), str(log), str(step_seconds)])

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What the engine wrote down, or all of one kind."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [event for line in lines if name in ("", (event := json.loads(line))["event"])]


@pytest.fixture(scope="session")
def scripts() -> ModuleType:
    """The scripts of `scripted_engine.py` by name: the first id of a prompt."""
    spec = importlib.util.spec_from_file_location("scripted_engine", Path(__file__).with_name("scripted_engine.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Scripted]:
    """One scripted server for all tests of a module that do not end it."""
    running = Scripted(tmp_path_factory.mktemp("steady") / "events.jsonl", tiny_checkpoint, 0.01, "auto", {})
    try:
        running.wait_until("serving")
        yield running
        assert running.end() == 0, "\n".join(running.said)
    finally:
        running.kill()


@pytest.fixture
def scripted(tmp_path: Path, tiny_checkpoint: Path) -> Iterator[Callable[..., Scripted]]:
    """`scripted(step_seconds=..., device=..., **settings)`: a server of its own, killed at the end if it still runs."""
    running: list[Scripted] = []

    def start(*, step_seconds: float = 0.01, device: str = "auto", until: str = "serving", **settings: Any) -> Scripted:
        found = Scripted(tmp_path / f"events-{len(running)}.jsonl", tiny_checkpoint, step_seconds, device, settings)
        running.append(found)
        if until:
            found.wait_until(until)
        return found

    yield start
    for each in running:
        each.kill()
