"""From start to end: the socket, what is said while loading, draining, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trine.serve.server import default_name

Scripted = Callable[..., Any]


def eventually(condition: Callable[[], Any]) -> Any:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)
    return found


def texts(stream: bytes) -> tuple[str, list[dict[str, Any]], bool]:
    """The joined text of a stream, its errors, and whether it ended as streams do."""
    data = [frame.removeprefix("data: ") for frame in stream.decode().split("\n\n") if frame.startswith("data: ")]
    values = [json.loads(text) for text in data if text != "[DONE]"]
    text = "".join(choice["text"] for value in values for choice in value.get("choices", ()))
    return text, [value["error"] for value in values if "error" in value], data[-1] == "[DONE]"


def test_only_this_user_can_reach_the_socket_and_it_is_gone_afterwards(scripted: Scripted) -> None:
    server = scripted()
    (start,) = server.events("start")
    assert (start["socket"], start["folder"]) == ("0o600", "0o700")
    assert not Path(start["path"]).parent.exists()
    assert server.end() == 0


def test_sigterm_lets_what_is_on_its_way_end_and_takes_nothing_new(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(step_seconds=0.05)
    stream = server.stream(prompt=[scripts.PLAIN], max_tokens=40)
    whole = server.send(prompt=[scripts.PLAIN], max_tokens=40)
    eventually(lambda: len(server.events("add")) == 2)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining: 2 completions may end within 30 s")
    status, answer, headers = server.ask("/v1/completions", {"prompt": [scripts.PLAIN]})
    assert (status, answer["error"]["code"], "retry-after" in headers) == (503, "shutting_down", True)
    assert server.ask("/ready")[0] == 503
    assert server.ask("/health")[0] == 200
    text, errors, done = texts(stream.read())
    assert (len(text), errors, done) == (40, [], True)
    response = whole.getresponse()
    assert len(json.loads(response.read())["choices"][0]["text"]) == 40
    response.close()
    assert server.wait() == 0
    assert len(server.events("finish")) == 2


@pytest.mark.parametrize("second_signal", [False, True])
def test_a_drain_has_an_end(scripted: Scripted, scripts: ModuleType, second_signal: bool) -> None:
    server = scripted(drain_seconds=60.0 if second_signal else 0.2)
    stream = server.stream(prompt=[scripts.PLAIN], max_tokens=4000)
    silent = server.send(prompt=[scripts.SILENT])
    eventually(lambda: len(server.events("add")) == 2)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    if second_signal:
        server.process.send_signal(signal.SIGTERM)
    text, (error,), done = texts(stream.read())
    assert text
    assert (error["code"], error["message"], done) == ("shutting_down", "the server is shutting down", True)
    response = silent.getresponse()
    assert response.status == 503
    response.close()
    assert server.wait() == 0
    server.wait_for("2 completions are cut off")


def test_ctrl_c_drains_too_and_says_so_by_its_exit_status(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted()
    stream = server.stream(prompt=[scripts.PLAIN], max_tokens=30)
    server.process.send_signal(signal.SIGINT)
    assert len(texts(stream.read())[0]) == 30
    assert server.wait() == 130


def test_while_loading_it_is_alive_and_not_ready(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(device="slow", until="listening")
    assert server.ask("/health")[0] == 200
    for path, body in (("/ready", None), ("/v1/models", None), ("/v1/completions", {"prompt": "x"})):
        status, answer, headers = server.ask(path, body)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "loading", "5"), path
    assert server.end() == 0


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(scripted: Scripted) -> None:
    server = scripted(device="broken", until="")
    assert server.wait() != 0
    assert any("device 'broken' does not exist" in line for line in server.said)


def trine_serve(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "trine.cli", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[-1]


def test_a_folder_that_is_no_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    status, line = trine_serve(tmp_path, "--port", 0)
    assert status == 1
    assert line.startswith("trine: ")
    assert str(tmp_path) in line


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = trine_serve(tiny_checkpoint, "--port", port)
    assert status == 1
    assert line == f"trine: cannot listen on 127.0.0.1:{port}: Address already in use; give another --host or --port"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", 70000], "port 70000 does not exist"),
        (["--max-in-flight", 0], "max-in-flight must be at least 1, got 0"),
        (["--drain-seconds", -1], "drain-seconds must be 0 or more, got -1"),
        (["--api-key", " x"], "an API key must be ASCII text without spaces around it"),
        (["--served-model-name", ""], "a served model needs a name"),
        (["--host", "no.such.host.invalid"], "cannot listen on 'no.such.host.invalid'"),
    ],
)
def test_impossible_options_are_refused(tiny_checkpoint: Path, options: list[object], said: str) -> None:
    status, line = trine_serve(tiny_checkpoint, *options)
    assert status == 2
    assert said in line


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a/small", "small"), ("a/small/final", "small"), ("a/small/step-00000100", "small"), ("a/finally", "finally")],
)
def test_a_model_is_called_as_its_folder_or_run(tmp_path: Path, folder: str, name: str) -> None:
    assert default_name(tmp_path / folder) == name


def test_an_empty_file_of_keys_is_refused_and_does_not_open_the_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n\n")
    status, line = trine_serve(tiny_checkpoint, "--api-key-file", tmp_path / "keys")
    assert status == 2
    assert "holds no API key" in line


def test_the_engine_process_is_not_reached_by_ctrl_c_at_the_terminal(scripted: Scripted) -> None:
    """Else it would end before the drain: it has a session of its own."""
    server = scripted()
    pid = server.events("start")[0]["pid"]
    assert os.getsid(pid) != os.getsid(server.process.pid)
    assert server.end() == 0
