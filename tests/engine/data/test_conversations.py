"""The layouts of conversations, and what is wrong with one, by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trine.engine.data.conversations import conversation_of, preference_of, tools_of
from trine.engine.data.examples import Record, read_records
from trine.engine.errors import DataError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x", "n": None}}}


def record(**fields: Any) -> Record:
    return Record("talks.jsonl:3", fields, 0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": TALK, "id": 7}, TALK),
        ({"messages": TALK, "system": "Be brief."}, [SYSTEM, *TALK]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "messages": None},
            TALK,
        ),
        ({"conversations": TALK}, TALK),
        ({"prompt": "Hi", "completion": "Hello"}, TALK),
        ({"prompt": [SYSTEM, TALK[0]], "completion": [TALK[1]]}, [SYSTEM, *TALK]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, TALK),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"messages": [{**TALK[0], "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]}, TALK),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": None, "name": None}]}, TALK),
        (
            {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": None, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                        ],
                    }
                ]
            },
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
                }
            ],
        ),
    ],
)
def test_every_layout_gives_the_messages_that_templates_take(fields: dict[str, Any], expected: Any) -> None:
    assert conversation_of(record(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "Hi"}, r'no conversation; the line has \'text\', wanted are "messages"'),
        ({"messages": []}, "field 'messages' should be a list of messages"),
        ({"messages": ["Hi"]}, "messages 1: a message should be an object, not str"),
        ({"messages": [{"content": "Hi"}]}, "messages 1: a message needs a role"),
        (
            {"messages": [TALK[0], {"role": "assistant"}]},
            "messages 2: a message needs a content that is text, not null",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "content that is text, not int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts of a content should be texts"),
        (
            {"messages": [{**TALK[1], "weight": 0}]},
            "'weight' of single messages is not known; say by objective.train_on",
        ),
        ({"messages": [SYSTEM, *TALK], "system": "Be long."}, "'system' stands beside a message of role system"),
        ({"messages": [{"role": "assistant", "tool_calls": "no"}]}, "tool_calls should be a list"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "no"}}]}]},
            "arguments of a call should be an object",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"prompt": "", "completion": "Hello"}, "field 'prompt' is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^talks\.jsonl:3: .*{message}"):
        conversation_of(record(**fields))


HELLO, BYE = TALK[1], {"role": "assistant", "content": "Bye"}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}, TALK[:1]),
        ({"prompt": "Hi", "chosen": HELLO, "rejected": BYE, "system": "Be brief."}, [SYSTEM, TALK[0]]),
        ({"messages": [SYSTEM, TALK[0]], "chosen": [HELLO], "rejected": [BYE]}, [SYSTEM, TALK[0]]),
        ({"chosen": TALK, "rejected": [TALK[0], BYE]}, TALK[:1]),
        ({"prompt": "Hi", "chosen": TALK, "rejected": [TALK[0], BYE], "system": "Be brief."}, [SYSTEM, TALK[0]]),
        ({"prompt": [TALK[0]], "chosen": TALK, "rejected": [TALK[0], BYE]}, TALK[:1]),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "Bye"},
            },
            TALK[:1],
        ),
    ],
)
def test_preferences_are_a_prompt_and_two_answers(fields: dict[str, Any], asked: Any) -> None:
    assert preference_of(record(**fields)) == (asked, [HELLO], [BYE])


def test_answers_may_begin_alike() -> None:
    called = {"role": "assistant", "content": "Let me see."}
    found = {"role": "tool", "content": "5"}
    pair = preference_of(record(prompt="Hi", chosen=[called, found, HELLO], rejected=[called, found, BYE]))
    assert pair == ([TALK[0], called, found], [HELLO], [BYE])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Hi", "chosen": "Hello"}, "no field 'rejected'"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, "'chosen' and 'rejected' are equal"),
        ({"chosen": TALK, "rejected": TALK[:1]}, "or one goes on where the other ends"),
        ({"chosen": "Hello", "rejected": "Bye"}, "no prompt; give 'prompt' or 'messages'"),
        ({"prompt": "Ho", "chosen": TALK, "rejected": [TALK[0], BYE]}, "begin with another conversation than 'prompt'"),
        ({"chosen": TALK, "rejected": [SYSTEM, *TALK]}, "no prompt"),
        (
            {"prompt": "Hi", "chosen": [TALK[0]], "rejected": BYE},
            "'chosen' differs from the other in a message of 'user'",
        ),
    ],
)
def test_what_is_no_preference_is_said_with_its_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^talks\.jsonl:3: .*{message}"):
        preference_of(record(**fields))


def test_tools_are_a_list_or_json_of_one() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert tools_of(record(tools=tools)) == tools_of(record(tools=json.dumps(tools))) == tools
    assert tools_of(record(tools=None)) is tools_of(record()) is tools_of(record(tools="")) is None
    with pytest.raises(DataError, match="'tools' should be a list"):
        tools_of(record(tools="{broken"))


def test_rows_of_parquet_are_lines_of_json(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    calling = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "name": "x"}]
    path = write_parquet(tmp_path / "talks.parquet", messages=[TALK, calling], source=["a", "b"])
    first, second = read_records(path)
    assert first.place == f"{path}:1"
    assert first.fields["source"] == "a"
    assert conversation_of(first) == TALK
    assert conversation_of(second) == calling
    write_parquet(tmp_path / "none.parquet", messages=[])
    with pytest.raises(DataError, match=r"none\.parquet: the file has no rows"):
        list(read_records(tmp_path / "none.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"broken\.parquet: not readable as Parquet"):
        list(read_records(tmp_path / "broken.parquet"))
    (tmp_path / "talks.txt").write_text("Hi")
    with pytest.raises(DataError, match=r"files that end in \.jsonl or \.parquet"):
        list(read_records(tmp_path / "talks.txt"))
