"""/tokenize and /detokenize: the ids that completions and chat are counted in, and their text."""

from __future__ import annotations

from typing import Any

import pytest

TALK = [{"role": "user", "content": "def add(first"}, {"role": "assistant", "content": "x"}]


def test_a_prompt_is_what_completions_make_of_it(server: Any) -> None:
    status, answer, _ = server.ask("/tokenize", {"prompt": "def añdd(first 🙂", "return_token_strs": True})
    assert status == 200
    completed = server.complete(prompt="def añdd(first 🙂", max_tokens=1, return_token_ids=True)
    assert answer["tokens"] == completed["choices"][0]["prompt_token_ids"]
    assert answer["count"] == len(answer["tokens"]) == completed["usage"]["prompt_tokens"]
    assert answer["max_model_len"] == server.ask("/v1/models")[1]["data"][0]["max_model_len"]
    assert len(answer["token_strs"]) == answer["count"]
    assert server.ask("/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "def añdd(first 🙂"}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_is_what_chat_makes_of_it(server: Any, add_generation_prompt: bool) -> None:
    asked = {"model": "also-tiny", "messages": TALK, "add_generation_prompt": add_generation_prompt}
    status, answer, _ = server.ask("/tokenize", asked)
    assert status == 200
    assert answer["token_strs"] is None
    chat = server.ask("/v1/chat/completions", {**asked, "max_tokens": 1, "return_token_ids": True})[1]
    assert answer["tokens"] == chat["choices"][0].get("prompt_token_ids", chat.get("prompt_token_ids"))


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": TALK}, 400, "prompt"),
        ("/tokenize", {"messages": TALK, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "model": "none"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "max_tokens": 3}, 400, "max_tokens"),
        ("/detokenize", {"tokens": []}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_what_is_refused(server: Any, path: str, fields: dict[str, Any], status: int, param: str) -> None:
    found, answer, _ = server.ask(path, fields)
    assert found == status, answer
    assert answer["error"]["param"] is not None
    assert answer["error"]["param"].startswith(param)
