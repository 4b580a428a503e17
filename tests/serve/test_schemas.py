"""Bodies: every field that is wrong, unknown or not supported is refused by its name, and null means not given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trine.serve.errors import ApiError
from trine.serve.jobs import guide_of, prompts_of, sampling_of
from trine.serve.messages import Guide, Sampling
from trine.serve.schemas import (
    ASKS_NOTHING,
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    ChatBody,
    CompletionBody,
    check_limits,
    parse_body,
)

TALK = [{"role": "user", "content": "x"}]


def refusal(kind: Any, fields: Any) -> tuple[int, str | None, str | None, str]:
    """Status, param, code and message of what is refused."""
    with pytest.raises(ApiError) as raised:
        parse_body(kind, fields if isinstance(fields, bytes) else json.dumps(fields).encode())
    return raised.value.status, raised.value.param, raised.value.code, raised.value.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": 1e999}', b"[" * 100_000]
)
def test_what_is_not_json(body: bytes) -> None:
    status, param, code, message = refusal(CompletionBody, body)
    assert (status, param, code) == (400, None, "invalid_json")
    assert message.startswith("the body is not valid")


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"3", b"null"])
def test_what_is_no_object(body: bytes) -> None:
    assert refusal(CompletionBody, body)[3].startswith("the body must be a JSON object")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": []}, "prompt", "must be a string, a list of strings"),
        ({"prompt": [[1], []]}, "prompt", "must be a string"),
        ({"prompt": [1, "x"]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": [1.5]}, "prompt", "must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({}, "prompt", "prompt is required"),
        ({"prompt": "x", "temperature": "1"}, "temperature", "should be a valid number, got '1'"),
        ({"prompt": "x", "temperature": -0.1}, "temperature", "got -0.1"),
        ({"prompt": "x", "temperature": True}, "temperature", "got True"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens", "got 1.5"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "got -1"),
        ({"prompt": "x", "max_tokens": 2**40}, "max_tokens", "got 1099511627776"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens 0 asks for nothing"),
        ({"prompt": "x", "top_p": 0}, "top_p", "got 0"),
        ({"prompt": "x", "top_k": -1}, "top_k", "got -1"),
        ({"prompt": "x", "min_p": 1.1}, "min_p", "got 1.1"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty", "got 3"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "got 0"),
        ({"prompt": "x", "n": 0}, "n", "got 0"),
        ({"prompt": "x", "seed": -1}, "seed", "got -1"),
        ({"prompt": "x", "seed": 10**30}, "seed", "got 1000000000000000000000000000000"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop", "none of them empty"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16 strings"),
        ({"prompt": "x", "stop": "a" * 1025}, "stop", "at most 1024 characters"),
        ({"prompt": "x", "stop": 3}, "stop", "must be a string or a list of strings"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "'a' is no token id"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100, got 101"),
        ({"prompt": "x", "logit_bias": {"5": True}}, "logit_bias", "got True"),
        ({"prompt": "x", "logit_bias": [5]}, "logit_bias", "must be an object"),
        ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"prompt": "x", "banned_token_ids": [-1]}, "banned_token_ids.0", "got -1"),
        ({"prompt": "x", "stream": "yes"}, "stream", "got 'yes'"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "only for stream: true"),
        ({"prompt": "x", "stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "unknown field"),
        (
            {"prompt": "x", "stream": True, "prompt_logprobs": 1},
            "prompt_logprobs",
            "prompt_logprobs cannot be streamed",
        ),
        ({"prompt": "x", "logprobs": True}, "logprobs", "got True"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format", "json_schema is needed"),
        ({"prompt": "x", "structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"prompt": "x", "n": 2, "temperature": 0}, "n", "repeats one completion"),
        ({"prompt": "x", "allowed_token_ids": [7], "banned_token_ids": [7]}, "banned_token_ids", "leaves no id"),
        ({"prompt": "x", "max_tokenz": 1}, "max_tokenz", "unknown field max_tokenz; did you mean max_tokens?"),
        ({"prompt": "x", "temperature": "1", "zzz": 1}, "zzz", "unknown field zzz"),
        ({"prompt": "x", "messages": TALK}, "messages", "unknown field messages"),
    ],
)
def test_completions_refuse(fields: dict[str, Any], param: str | None, said: str) -> None:
    status, found, _, message = refusal(CompletionBody, fields)
    assert (status, found) == (400, param)
    assert said in message


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "messages", "messages is required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "got 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "only parts like",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls", "unknown field"),
        ({"messages": TALK, "top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs: true"),
        ({"messages": TALK, "logprobs": 2}, "logprobs", "got 2"),
        ({"messages": TALK, "max_tokens": 0}, "max_tokens", "at least 1, got 0"),
        ({"messages": TALK, "max_completion_tokens": 0}, "max_completion_tokens", "got 0"),
        ({"messages": TALK, "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of them"),
        ({"messages": TALK, "prompt": "x"}, "prompt", "unknown field prompt"),
    ],
)
def test_chat_refuses(fields: dict[str, Any], param: str | None, said: str) -> None:
    status, found, _, message = refusal(ChatBody, fields)
    assert (status, found) == (400, param)
    assert said in message


@pytest.mark.parametrize(
    ("kind", "name", "required"),
    [(CompletionBody, name, {"prompt": "x"}) for name in sorted(UNSUPPORTED_IN_COMPLETIONS)]
    + [(ChatBody, name, {"messages": TALK}) for name in sorted(UNSUPPORTED_IN_CHAT)],
)
def test_fields_of_openai_that_are_not_here_are_refused_unless_they_are_null(
    kind: Any, name: str, required: dict[str, Any]
) -> None:
    values: tuple[Any, ...] = ([{}], 2, "x")
    for value in values:
        assert refusal(kind, {**required, name: value})[1:3] == (name, "unsupported_parameter")
    assert parse_body(kind, json.dumps({**required, name: None}).encode())


@pytest.mark.parametrize(
    ("kind", "names", "required"),
    [
        (CompletionBody, UNSUPPORTED_IN_COMPLETIONS, {"prompt": "x"}),
        (ChatBody, UNSUPPORTED_IN_CHAT, {"messages": TALK}),
    ],
)
def test_defaults_that_ask_for_nothing_are_taken(kind: Any, names: frozenset[str], required: dict[str, Any]) -> None:
    for name, values in ASKS_NOTHING.items():
        for value in values if name in names else ():
            assert parse_body(kind, json.dumps({**required, name: value}).encode()) == kind(**required)
    for name in ("store", "best_of"):
        if name in names:
            assert refusal(kind, {**required, name: {"store": True, "best_of": True}[name]})[1] == name


@pytest.mark.parametrize(("kind", "required"), [(CompletionBody, {"prompt": "x"}), (ChatBody, {"messages": TALK})])
def test_null_means_not_given(kind: Any, required: dict[str, Any]) -> None:
    nulls = dict.fromkeys(kind.model_fields, None)
    assert parse_body(kind, json.dumps({**nulls, **required}).encode()) == kind(**required)


def test_what_is_not_given_has_the_engines_default() -> None:
    body = parse_body(CompletionBody, b'{"prompt": "x"}')
    assert sampling_of(body, 128, logprobs=None, prompt_logprobs=None) == Sampling()


def test_every_field_reaches_the_engine() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "seed": 4,
        "stop": "a",
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_tokens": 6,
        "n": 2,
        "logit_bias": {"7": 8},
        "allowed_token_ids": [9],
        "banned_token_ids": [10],
        "skip_special_tokens": False,
    }
    body = parse_body(CompletionBody, json.dumps({"prompt": "x", **fields}).encode())
    sampling = sampling_of(body, 11, logprobs=12, prompt_logprobs=13)
    default = Sampling()
    assert all(getattr(sampling, name) != getattr(default, name) for name in Sampling.__struct_fields__)
    assert (sampling.stop, sampling.stop_ids, sampling.logit_bias) == (("a",), (5,), ((7, 8.0),))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    assert prompts_of(parse_body(CompletionBody, json.dumps({"prompt": prompt}).encode())) == expected


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Guide("json_object", "", "response_format")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            Guide("json_schema", '{"type": "object"}', "response_format"),
        ),
        (
            {"structured_outputs": {"json": {"type": "array"}}},
            Guide("json_schema", '{"type": "array"}', "structured_outputs"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Guide("regex", "a+", "structured_outputs")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Guide("choice", '["a", "b"]', "structured_outputs")),
        ({"structured_outputs": {"grammar": "start: /x/"}}, Guide("grammar", "start: /x/", "structured_outputs")),
    ],
)
def test_what_the_text_must_match(fields: dict[str, Any], guide: Guide | None) -> None:
    assert guide_of(parse_body(CompletionBody, json.dumps({"prompt": "x", **fields}).encode())) == guide


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionBody, {"prompt": "x", "n": 3}, "n"),
        (CompletionBody, {"prompt": "x", "logprobs": 6}, "logprobs"),
        (CompletionBody, {"prompt": "x", "prompt_logprobs": 6}, "prompt_logprobs"),
        (ChatBody, {"messages": TALK, "logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ],
)
def test_limits_of_the_operator(kind: Any, fields: dict[str, Any], param: str) -> None:
    body = parse_body(kind, json.dumps(fields).encode())
    check_limits(body, max_n=3, max_logprobs=6)
    with pytest.raises(ApiError, match=f"{param} must be at most"):
        check_limits(body, max_n=2, max_logprobs=5)


def test_an_answer_goes_back_as_a_turn() -> None:
    """As openai's client sends one: the nulls of our own answers stand in it, and those of others."""
    answer = {"role": "assistant", "content": "y", "refusal": None, "annotations": None, "tool_calls": None}
    body = parse_body(ChatBody, json.dumps({"messages": [*TALK, answer, *TALK]}).encode())
    assert body.messages[1].for_template() == {"role": "assistant", "content": "y"}
