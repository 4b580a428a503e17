"""Keys, sizes, strangers: what an open port must stand."""

from __future__ import annotations

import json
import random
import socket
import string
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trine.serve.app import make_app
from trine.serve.messages import Start
from trine.serve.schemas import ChatBody, CompletionBody
from trine.serve.service import Service
from trine.serve.settings import ServerSettings

Scripted = Callable[..., Any]
KEYS = ("first-key", "second-key")


def raw(server: Any, *pieces: bytes, wait: float = 0.0) -> bytes:
    """Bytes sent as they are; everything that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(wait)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def test_every_route_asks_for_the_key_but_the_two_probes(scripted: Scripted, scripts: ModuleType) -> None:
    server = scripted(api_keys=KEYS)
    service = Service(ServerSettings(start=Start(checkpoint="x"), names=("x",)), [])
    app: Any = make_app(service)
    routes = {route.path.replace("{name:path}", "scripted"): route for route in app._app.routes}
    assert len(routes) == 13
    body = {"prompt": [scripts.PLAIN], "max_tokens": 1}
    for path, route in [*routes.items(), ("/no/such/route", None), ("/v1/completions/", None), ("//ready", None)]:
        method = "GET" if route is None or "GET" in route.methods else "POST"
        given = body if method == "POST" else None
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}):
            status, answer, got = server.ask(path, given, method=method, headers=headers)
            if path in ("/health", "/ready"):
                assert status == 200
            else:
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), path
                assert got["www-authenticate"] == "Bearer"
    for key in KEYS:
        for scheme in ("Bearer", "bearer"):
            status, answer, _ = server.ask("/v1/completions", body, headers={"authorization": f"{scheme} {key}"})
            assert status == 200, answer
    assert server.ask("/v1/models/large", headers={"authorization": f"Bearer {KEYS[0]}"})[0] == 404


def test_a_server_that_anybody_can_reach_without_a_key_warns(scripted: Scripted) -> None:
    server = scripted(host="0.0.0.0", until="")
    server.wait_for("warning: anybody who reaches http://0.0.0.0:")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413_before_it_has_come(scripted: Scripted, chunked: bool) -> None:
    server = scripted(max_body_bytes=1000)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    if chunked:
        answer = raw(server, head + b"transfer-encoding: chunked\r\n\r\n", b"3e9\r\n" + b"x" * 1001 + b"\r\n")
    else:
        answer = raw(server, head + b"content-length: 1000000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer


def test_a_body_that_does_not_come_is_408(scripted: Scripted) -> None:
    server = scripted(read_seconds=0.2)
    answer = raw(server, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "bytes_sent",
    [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", b"\x16\x03\x01\x00"],
)
def test_what_is_no_http_ends_that_connection_alone(steady: Any, bytes_sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", steady.port), timeout=60) as connection:
        connection.sendall(bytes_sent)
        connection.shutdown(socket.SHUT_WR)
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass
    assert steady.ask("/ready")[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/nothing", "GET", 404, "not_found"),
        ("/v1/completions", "GET", 405, "method_not_allowed"),
        ("/v1/models", "DELETE", 405, "method_not_allowed"),
        ("/v1/models/a/b/../c", "GET", 404, "model_not_found"),
        ("/docs", "GET", 404, "not_found"),
        ("/openapi.json", "GET", 404, "not_found"),
    ],
)
def test_paths_and_methods_that_are_not_there(steady: Any, path: str, method: str, status: int, code: str) -> None:
    found, answer, _ = steady.ask(path, method=method)
    assert (found, answer["error"]["code"]) == (status, code)


def test_strangers_cannot_make_new_series_of_metrics(steady: Any) -> None:
    def series() -> set[str]:
        page = steady.ask("/metrics")[1]
        return {line.rpartition(" ")[0] for line in page.splitlines() if line.startswith("trine_http_requests_total")}

    for number in range(3):
        assert steady.ask(f"/{number}", method=f"METHOD{number}")[0] == 404
        assert steady.ask("/health", method=f"METHOD{number}")[0] == 405
    before = series()
    for number in range(3, 9):
        steady.ask(f"/{number}", method=f"METHOD{number}")
        steady.ask("/health", method=f"METHOD{number}")
        steady.ask(f"/v1/models/{number}")
    assert len(series() - before) <= 2  # /v1/models/{name} answering 404, and /metrics itself


def test_a_chat_without_a_template_is_400(steady: Any) -> None:
    status, answer, _ = steady.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert (status, answer["error"]["code"]) == (400, "no_chat_template")
    assert "use /v1/completions" in answer["error"]["message"]


def test_too_many_prompts_in_one_request(scripted: Scripted) -> None:
    server = scripted(max_prompts=2)
    status, answer, _ = server.ask("/v1/completions", {"prompt": ["a", "b", "c"]})
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_keys_are_not_shown(tiny_checkpoint: Path) -> None:
    settings = ServerSettings(start=Start(checkpoint=str(tiny_checkpoint)), names=("x",), api_keys=KEYS)
    assert KEYS[0] not in repr(settings)


def any_value(generator: random.Random, depth: int = 0) -> Any:
    """Something that JSON can hold: often nearly right, often absurd."""
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: generator.random() < 0.5,
        lambda: generator.choice([0, 1, 2, -1, 5, 63, 2**31, 2**63, -(2**63), 10**25]),
        lambda: generator.choice([0.0, 0.5, 1.0, -0.5, 1e-308, 1e308]),
        lambda: "".join(generator.choices(string.printable + "äß\u0000\ud7ff😀", k=generator.randrange(12))),
    ]
    if depth < 3:
        choices += [
            lambda: [any_value(generator, depth + 1) for _ in range(generator.randrange(4))],
            lambda: {
                str(any_value(generator, 3)): any_value(generator, depth + 1) for _ in range(generator.randrange(4))
            },
        ]
    return generator.choice(choices)()


def any_body(generator: random.Random, kind: Any) -> dict[str, Any]:
    """Some fields of a body, each right or random; streams and long answers left out."""
    right: dict[str, Callable[[], Any]] = {
        "prompt": lambda: generator.choice(["def add(", [5, 6, 7], ["a", "b"], [[1], [2, 3]], "", [299]]),
        "messages": lambda: [{"role": generator.choice(["user", "tool"]), "content": generator.choice(["x", "", "ä"])}],
        "max_tokens": lambda: generator.randrange(1, 6),
        "temperature": lambda: generator.choice([0, 0.5, 1, 100]),
        "top_p": lambda: generator.choice([1e-9, 0.5, 1]),
        "top_k": lambda: generator.choice([0, 1, 5, 10**6]),
        "min_p": lambda: generator.choice([0, 0.5, 1]),
        "repetition_penalty": lambda: generator.choice([1e-9, 1, 100]),
        "presence_penalty": lambda: generator.choice([-2, 2]),
        "frequency_penalty": lambda: generator.choice([-2, 2]),
        "n": lambda: generator.choice([1, 2, 3]),
        "seed": lambda: generator.choice([0, 2**63 - 1]),
        "stop": lambda: generator.choice(["a", ["a", "\n"]]),
        "stop_token_ids": lambda: generator.choice([[], [0], [2**31 - 1]]),
        "logit_bias": lambda: generator.choice([{}, {"5": -100}, {"100000": 1}]),
        "allowed_token_ids": lambda: generator.choice([[5], [5, 6], [100000]]),
        "banned_token_ids": lambda: generator.choice([[], [5], list(range(295))]),
        "min_tokens": lambda: generator.choice([0, 3, 100]),
        "logprobs": lambda: generator.choice([0, 5, 20, True]),
        "top_logprobs": lambda: generator.choice([0, 20]),
        "prompt_logprobs": lambda: generator.choice([0, 5]),
        "echo": lambda: True,
        "priority": lambda: generator.choice([-5, 5]),
        "cache_salt": lambda: "s",
    }
    names = [name for name in kind.model_fields if name not in ("stream", "stream_options")]
    needed = "prompt" if kind is CompletionBody else "messages"
    chosen = {needed, "max_tokens", *generator.sample(names, generator.randrange(6))}
    return {
        name: right[name]() if name in right and generator.random() < 0.8 else any_value(generator)
        for name in sorted(chosen)
    }


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_no_body_wedges_the_server_or_passes_for_a_fault_of_its_own(server: Any, kind: Any) -> None:
    """Seeded random bodies: each is answered or refused, none is a 5xx, and afterwards nothing is held."""
    generator = random.Random(str(kind))
    path = "/v1/completions" if kind is CompletionBody else "/v1/chat/completions"
    statuses = []
    for _ in range(150):
        body = any_body(generator, kind)
        status, answer, _ = server.ask(path, json.dumps(body).encode())
        assert status in (200, 400, 404), (body, answer)
        if status != 200:
            assert answer["error"]["message"]
        statuses.append(status)
    assert statuses.count(200) > 10, "some are fine"
    page = server.ask("/metrics")[1]
    for name in ("trine_num_requests_running", "trine_num_requests_waiting", "trine_completions_in_flight"):
        assert f"\n{name} 0.0\n" in page
    assert server.ask("/ready")[0] == 200
