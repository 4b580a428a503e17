"""An encoder-decoder over HTTP: the prompt is its source, what comes is what the plain generator gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams

TEXTS = ["def add(first, second):", "the cat", "the mat sat on the cat", "first + second", "cat"]


@pytest.fixture(scope="module")
def marian(server_class: Any, seq2seq_folder: Callable[[str], Path]) -> Iterator[Any]:
    """`trine serve` on a tiny Marian of 32 positions."""
    command = [sys.executable, "-m", "trine.cli", "serve", str(seq2seq_folder("marian")), "--port", "0"]
    running = server_class([*command, "--served-model-name", "tiny"])
    try:
        running.wait_until("serving")
        yield running
        assert running.end() == 0, "\n".join(running.said)
    finally:
        running.kill()


def test_sources_at_once_get_what_each_gets_alone(marian: Any, seq2seq_folder: Callable[[str], Path]) -> None:
    model, tokenizer = load_for_inference(seq2seq_folder("marian"))
    params = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=6)
    expected = generate(model, tokenizer, TEXTS, params)
    fields = {"model": "tiny", "temperature": 0, "max_tokens": 12, "min_tokens": 6}

    def ask(text: str) -> Any:
        status, answer, _ = marian.ask("/v1/completions", {**fields, "prompt": text})
        assert status == 200, answer
        return answer

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, TEXTS))
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer["choices"][0]["text"] == wanted.text
        assert answer["usage"]["prompt_tokens"] == wanted.prompt_tokens
        assert answer["usage"]["completion_tokens"] == wanted.completion_tokens


def test_stream_joins_to_the_whole(marian: Any, seq2seq_folder: Callable[[str], Path]) -> None:
    model, tokenizer = load_for_inference(seq2seq_folder("marian"))
    [expected] = generate(model, tokenizer, TEXTS[:1], SamplingParams(temperature=0.0, max_tokens=12, min_tokens=6))
    response = marian.stream(model="tiny", prompt=TEXTS[0], temperature=0, max_tokens=12, min_tokens=6)
    lines = [line for line in response.read().decode().split("\n") if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    pieces = [json.loads(line[6:])["choices"] for line in lines]
    assert "".join(choice["text"] for choices in pieces for choice in choices) == expected.text
    assert len(pieces) > 1


def test_source_that_is_too_long_is_refused_with_both_lengths(marian: Any) -> None:
    status, answer, _ = marian.ask("/v1/completions", {"model": "tiny", "prompt": [5] * 33})
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert "the source of an encoder-decoder and has 33 tokens; it can have 32" in answer["error"]["message"]
    status, answer, _ = marian.ask("/v1/completions", {"model": "tiny", "prompt": [5] * 32, "max_tokens": 99})
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == 32


def test_log_probabilities_of_a_source_are_refused(marian: Any) -> None:
    status, answer, _ = marian.ask("/v1/completions", {"model": "tiny", "prompt": "cat", "prompt_logprobs": 1})
    assert status == 400
    assert "prompt_logprobs are not known of a source" in answer["error"]["message"]
