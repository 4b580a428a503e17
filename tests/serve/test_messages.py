"""The socket's messages: nothing is lost on the way, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from trine.engine.generate.records import EngineStats
from trine.engine.generate.sampling import SamplingParams
from trine.serve import messages
from trine.serve.engine_process import to_params
from trine.serve.messages import (
    LENGTH_BYTES,
    Abort,
    AdapterChanged,
    Delta,
    Failed,
    Guide,
    LoadAdapter,
    Logprob,
    Ping,
    Pong,
    ProtocolError,
    Ready,
    Refused,
    Sampling,
    Start,
    Stats,
    Step,
    Stop,
    Submit,
    UnloadAdapter,
    body_length,
    pack,
    unpack_to_engine,
    unpack_to_server,
)

SAMPLING = Sampling(
    max_tokens=3, temperature=0.5, seed=2**63 - 1, stop=("ä", "\n"), stop_ids=(4,), logit_bias=((5, -1.5),), logprobs=0
)
DELTA = Delta(
    id="x-0",
    choice=2,
    text="né",
    token_ids=[1, 2**31],
    logprobs=[Logprob(1, -0.25, 3, [(7, -0.125)])],
    finish_reason="stop",
    stop_reason="\n",
    prompt_logprobs=[None, Logprob(2, -9.0, 1, [])],
)
TO_ENGINE: list[Any] = [
    Start(checkpoint="/a", max_running=3, adapters=(("x", "/x"),)),
    Submit(
        id="x-0",
        prompt_ids=[1, 2],
        sampling=SAMPLING,
        priority=-1,
        salt="s",
        guide=Guide("regex", "a+", "structured_outputs"),
        adapter="x",
    ),
    Abort(id="x-0"),
    Ping(number=5),
    LoadAdapter(number=1, name="x", folder="/x"),
    UnloadAdapter(number=2, name="x"),
    Stop(),
]
TO_SERVER: list[Any] = [
    AdapterChanged(number=1),
    AdapterChanged(number=2, error="no"),
    Ready(folder="/a", vocab_size=5, context_len=6, device="cpu", dtype="float32"),
    Failed(error="no", exit_status=2),
    Refused(id="x-0", reason="full", error="9 are waiting"),
    Step(deltas=[DELTA, Delta(id="y")], stats=Stats(running=1, step_seconds=0.5)),
    Pong(number=5),
]


@pytest.mark.parametrize(
    ("message", "unpack"),
    [(each, unpack_to_engine) for each in TO_ENGINE] + [(each, unpack_to_server) for each in TO_SERVER],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else "",
)
def test_a_message_arrives_as_it_was_sent(message: Any, unpack: Any) -> None:
    frame = pack(message)
    assert body_length(frame[:LENGTH_BYTES]) == len(frame) - LENGTH_BYTES
    assert unpack(frame[LENGTH_BYTES:]) == message


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"hello", msgspec.msgpack.encode(["Submit", 1]), pack(Pong(number=1))[4:]]
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_to_engine(body)


def test_every_cut_of_a_message_is_refused() -> None:
    body = pack(TO_SERVER[3])[LENGTH_BYTES:]
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            unpack_to_server(body[:length])


def test_a_frame_that_claims_too_much_is_refused() -> None:
    with pytest.raises(ProtocolError, match="claims 4294967295 bytes"):
        body_length(b"\xff" * LENGTH_BYTES)


def test_a_message_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 10)
    with pytest.raises(ProtocolError, match="exceeds the limit of 10"):
        pack(Abort(id="x" * 20))


def test_sampling_has_the_engines_fields_and_defaults() -> None:
    expected = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert {name: getattr(Sampling(), name) for name in Sampling.__struct_fields__} == expected
    params = to_params(SAMPLING)
    assert all(getattr(params, name) == getattr(SAMPLING, name) for name in expected)


def test_stats_are_the_engines() -> None:
    assert set(Stats.__struct_fields__) <= {field.name for field in dataclasses.fields(EngineStats)}
