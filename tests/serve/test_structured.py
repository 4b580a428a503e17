"""Answers that must match something: the formats of OpenAI's API and the field of our own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from trine.engine.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = "def add(first"


@pytest.fixture(scope="module")
def blanks(chat_checkpoint: Path) -> list[int]:
    """Tokens that begin with a blank: a random model would fill its short context with them."""
    table = Tokenizer.load(chat_checkpoint).token_bytes
    assert table is not None
    return [token for token, text in enumerate(table) if text[:1].isspace()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_of_a_chat(server: Any, blanks: list[int], stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": form}
    asked["extra_body"] = {"banned_token_ids": blanks}
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
        for seed in range(3):
            if stream:
                chunks = client.chat.completions.create(**asked, seed=seed, stream=True)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            else:
                text = client.chat.completions.create(**asked, seed=seed).choices[0].message.content or ""
            value = json.loads(text)
            assert value["name"] in ("Ada", "Bob")
            assert 0 <= value["age"] <= 9


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", "maybe"]}, "yes|no|maybe"),
        ({"grammar": 'start: "<" /[xyz]{4}/ ">"'}, "<[xyz]{4}>"),
        ({"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3}}, r"\[[12](,[12]){0,2}\]"),
    ],
)
def test_structured_outputs(server: Any, blanks: list[int], wanted: dict[str, Any], pattern: str) -> None:
    asked = {"max_tokens": 40, "seed": 1, "n": 3, "banned_token_ids": blanks}
    answer = server.complete(prompt=PROMPT, structured_outputs=wanted, **asked)
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["text"]), choice
        assert choice["finish_reason"] == "stop"


def test_any_json_object(server: Any) -> None:
    answer = server.complete(prompt=PROMPT, max_tokens=30, seed=2, response_format={"type": "json_object"})
    (choice,) = answer["choices"]
    assert choice["text"].lstrip().startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": "("},
        {"grammar": "start: nothing"},
        {"json": {"type": "no such type"}},
        {"regex": "a" * 2**18},
        {"choice": [""]},
    ],
)
def test_what_cannot_be_matched_fails_its_request_alone(server: Any, wanted: dict[str, Any]) -> None:
    beside = server.send(prompt=PROMPT, max_tokens=30, temperature=0, ignore_eos=True)
    status, answer, _ = server.ask("/v1/completions", {"prompt": PROMPT, "structured_outputs": wanted})
    assert status == 400
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", "structured_outputs")
    response = beside.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["usage"]["completion_tokens"] == 30
    response.close()
