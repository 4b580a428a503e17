"""What goes wrong, and who notices: one request, its client, or everybody when the engine process is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

Scripted = Callable[..., Any]


def eventually(condition: Callable[[], Any]) -> Any:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)
    return found


def events_of(stream: bytes) -> list[Any]:
    """The data of a stream's events: JSON, or the text [DONE]."""
    frames = [frame for frame in stream.decode().split("\n\n") if frame.startswith("data: ")]
    return [text if (text := frame[6:]) == "[DONE]" else json.loads(text) for frame in frames]


@pytest.mark.parametrize(
    ("script", "status", "code", "message"),
    [
        ("REFUSED", 400, "invalid_value", "temperature 99 is too hot"),
        ("TOO_LONG", 400, "context_length_exceeded", "the prompt is too long for the cache"),
        ("FULL", 429, "server_full", "9 are waiting"),
        ("MISTAKE", 500, "internal_error", "the engine failed on this request: 'a mistake'"),
        ("FAILS_LATER", 500, "generation_failed", "logits are not finite"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_fails_alone(
    steady: Any, scripts: ModuleType, script: str, status: int, code: str, message: str, stream: bool
) -> None:
    server = steady
    with ThreadPoolExecutor() as pool:
        other = pool.submit(server.complete, prompt=[scripts.PLAIN], max_tokens=30)
        body = {"prompt": [getattr(scripts, script)], "max_tokens": 30, "stream": stream}
        if stream and script == "FAILS_LATER":  # two tokens have left by then, and the status with them
            response = server.stream(prompt=body["prompt"], max_tokens=30)
            *pieces, error, done = events_of(response.read())
            assert (response.status, len(pieces), done) == (200, 2, "[DONE]")
            assert error["error"] == {"message": message, "type": "server_error", "param": None, "code": code}
        else:
            found, answer, headers = server.ask("/v1/completions", body)
            assert (found, answer["error"]["code"], answer["error"]["message"]) == (status, code, message)
            assert ("retry-after" in headers) == (status == 429)
        assert other.result()["usage"]["completion_tokens"] == 30


def test_one_failing_prompt_aborts_the_others_of_its_request(steady: Any, scripts: ModuleType) -> None:
    server, before = steady, len(steady.events("abort"))
    body = {"prompt": [[scripts.PLAIN], [scripts.FAILS_LATER]], "max_tokens": 1000}
    assert server.ask("/v1/completions", body)[0] == 500
    eventually(lambda: [event["known"] for event in server.events("abort")[before:]] == [True])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_aborted_within_a_step(
    scripted: Scripted, scripts: ModuleType, stream: bool
) -> None:
    server = scripted(step_seconds=0.2)
    if stream:
        response = server.stream(prompt=[scripts.PLAIN], max_tokens=2000)
        assert response.readline().startswith(b"data: ")
        steps = server.events("add")[-1]["step"]
        response.hang_up()
    else:
        connection = server.send(prompt=[scripts.PLAIN], max_tokens=2000)
        steps = eventually(lambda: server.events("add"))[-1]["step"]
        connection.close()
    (abort,) = eventually(lambda: server.events("abort"))
    assert abort["known"]
    assert abort["step"] <= steps + 3  # the one under way, and one for each process to notice
    status, _, _ = server.ask("/v1/completions", {"prompt": [scripts.PLAIN], "max_tokens": 1})
    assert status == 200
    assert "completions_in_flight 0.0" in server.ask("/metrics")[1]


def test_a_client_that_does_not_read_is_cut_off_and_costs_little(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(step_seconds=0.0, max_unread_tokens=16, write_seconds=0.5)
    lazy = socket.create_connection(("127.0.0.1", server.port))
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"prompt": [scripts.LARGE], "max_tokens": 4000, "stream": True})  # 256 MiB of text
    lazy.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    before = memory_of(server.process.pid)
    (abort,) = eventually(lambda: server.events("abort"))
    assert abort["known"]
    assert memory_of(server.process.pid) - before < 32 * 2**20
    assert server.complete(prompt=[scripts.PLAIN], max_tokens=3)["usage"]["completion_tokens"] == 3
    lazy.close()


def memory_of(pid: int) -> int:
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def test_more_than_it_takes_is_429_and_room_is_given_back(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(max_in_flight=3)
    silent = server.send(prompt=[scripts.SILENT], n=2, stream=True)
    eventually(lambda: server.events("add"))
    one = {"prompt": [scripts.PLAIN], "max_tokens": 1}
    assert server.ask("/v1/completions", {**one, "n": 1})[0] == 200
    status, answer, headers = server.ask("/v1/completions", {**one, "n": 2})
    assert (status, answer["error"]["type"], headers["retry-after"]) == (429, "rate_limit_error", "1")
    assert server.ask("/v1/completions", {**one, "n": 4})[0] == 400  # never, so waiting is no use
    silent.close()
    eventually(lambda: server.events("abort"))
    eventually(lambda: server.ask("/v1/completions", {**one, "n": 3})[0] == 200)


def test_silence_is_filled_with_comments(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(ping_seconds=0.05)
    response = server.stream(prompt=[scripts.SILENT])
    assert response.headers["content-type"].startswith("text/event-stream")
    assert [response.readline() for _ in range(4)] == [b": \n", b"\n"] * 2
    response.hang_up()


@pytest.mark.parametrize(
    ("script", "said"),
    [("DIES", "ended with exit status 7"), ("STEP_RAISES", "a step failed: ZeroDivisionError: a step cannot go on")],
)
def test_an_engine_that_dies_is_503_for_all_and_the_exit_status(
    scripted: Scripted, scripts: ModuleType, script: str, said: str
) -> None:
    server = scripted(step_seconds=0.05)
    stream = server.stream(prompt=[scripts.PLAIN], max_tokens=2000)
    assert stream.readline().startswith(b"data: ")
    status, answer, headers = server.ask("/v1/completions", {"prompt": [getattr(scripts, script)]})
    assert (status, answer["error"]["code"]) == (503, "engine_died")
    assert said in answer["error"]["message"]
    assert int(headers["retry-after"]) > 0
    *_, error, done = events_of(stream.read())
    assert (error["error"]["code"], done) == ("engine_died", "[DONE]")
    assert server.wait() == 1
    assert any(said in line for line in server.said)


def test_kill_9_of_the_engine_process(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted()
    waiting = server.send(prompt=[scripts.SILENT])
    eventually(lambda: server.events("add"))
    os.kill(server.events("start")[0]["pid"], signal.SIGKILL)
    response = waiting.getresponse()
    assert response.status == 503
    assert "killed by SIGKILL" in json.loads(response.read())["error"]["message"]
    assert server.ask("/health")[0] == 200
    assert server.ask("/ready")[0] == 503
    assert server.ask("/v1/completions", {"prompt": [scripts.PLAIN]})[0] == 503
    assert server.wait() == 1


def test_kill_9_of_the_server_ends_the_engine_process(scripted: Scripted) -> None:
    server = scripted()
    pid = server.events("start")[0]["pid"]
    server.process.kill()
    eventually(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in state_of(pid))


def state_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as line:
            return line.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_ready_asks_the_loop_that_computes(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(ready_seconds=0.3)
    assert server.ask("/ready")[0] == 200
    stuck = server.send(prompt=[scripts.HANGS])
    eventually(lambda: server.events("add"))
    _, answer, _ = eventually(lambda: found if (found := server.ask("/ready"))[0] == 503 else None)
    assert answer["error"]["code"] == "engine_busy"
    assert server.ask("/health")[0] == 200
    stuck.close()
    server.kill()


def test_many_at_once_each_get_their_own(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(step_seconds=0.002, max_in_flight=64)
    lengths = [3 + index % 17 for index in range(64)]
    barrier = threading.Barrier(16)

    def one(length: int) -> tuple[str, int]:
        if length % 2:
            response = server.stream(prompt=[scripts.PLAIN], max_tokens=length)
            pieces = events_of(response.read())[:-1]
            return "".join(piece["choices"][0]["text"] for piece in pieces), length
        answer = server.complete(prompt=[scripts.PLAIN], max_tokens=length)
        return answer["choices"][0]["text"], length

    with ThreadPoolExecutor(16, initializer=lambda: barrier.wait(60) and None) as pool:
        for text, length in pool.map(one, lengths):
            assert text == "abcdefghijklmnopqrstuvwxyz"[:length]
    assert server.ask("/metrics")[1].count("trine_completions_in_flight 0.0") == 1
