"""Conversations as they are written down: lines of several layouts to one, the messages that chat templates take.

    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}        OpenAI, TRL, Hugging Face
    {"conversations": [{"from": "human", "value": "..."}, ...]}                     ShareGPT; "system" beside it
    {"prompt": "...", "completion": "..."}                                          texts, or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}                         Alpaca
    {"prompt" or "messages": ..., "chosen": ..., "rejected": ...}                   two answers, one of them preferred

Of the first four, the first that a line has is taken. Content that is a list of text parts becomes one text; calls of
tools have their arguments as an object, as templates want them, where they were written as JSON in a string. What is
null is as if it were not there: tables give every message the keys of all. What is not right is one `DataError` with
file and line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trine.engine.data.examples import Record, kind_of
from trine.engine.errors import DataError

Messages = list[dict[str, Any]]
# Names in "from" that are not the roles of today.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "observation": "tool",
}  # fmt: skip
_LAYOUTS = '"messages", "conversations", "prompt" and "completion", or "instruction" and "output"'


def conversation_of(record: Record) -> Messages:
    """The messages of a line."""
    fields = record.fields
    for name in ("messages", "conversations"):
        if fields.get(name) is not None:
            return _with_system(record, messages_of(record, name))
    if fields.get("prompt") is not None and fields.get("completion") is not None:
        return [*turns_of(record, "prompt", "user"), *turns_of(record, "completion", "assistant")]
    if fields.get("instruction") is not None and fields.get("output") is not None:
        asked = record.text("instruction")
        if fields.get("input"):
            asked += "\n\n" + record.text("input")
        answer = {"role": "assistant", "content": record.text("output")}
        return _with_system(record, [{"role": "user", "content": asked}, answer])
    known = ", ".join(map(repr, fields)) or "none"
    raise DataError(f"{record.place}: no conversation; the line has {known}, wanted are {_LAYOUTS}")


def preference_of(record: Record) -> tuple[Messages, Messages, Messages]:
    """What was asked, the answer that is preferred, and the other one.

    Answers are texts, messages or lists of messages; lists may be whole conversations, which begin alike.
    """
    chosen, rejected = (turns_of(record, name, "assistant") for name in ("chosen", "rejected"))
    alike = next((n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), None)
    if alike is None:
        raise DataError(f"{record.place}: 'chosen' and 'rejected' are equal, or one goes on where the other ends")
    asked = _asked(record, chosen[:alike])
    for name, answer in (("chosen", chosen[alike:]), ("rejected", rejected[alike:])):
        if answer[0]["role"] != "assistant":
            raise DataError(f"{record.place}: {name!r} differs from the other in a message of {answer[0]['role']!r}")
    return asked, chosen[alike:], rejected[alike:]


def _asked(record: Record, begun: Messages) -> Messages:
    """The prompt, with what both answers begin with: that may be the prompt itself."""
    field = next((name for name in ("prompt", "messages", "conversations") if record.fields.get(name)), None)
    if field is None:
        if not begun:
            raise DataError(f"{record.place}: no prompt; give 'prompt' or 'messages', or answers that begin with it")
        return _with_system(record, begun)
    prompt = turns_of(record, field, "user")
    in_words = isinstance(record.fields[field], str)
    if begun[: len(prompt)] == prompt or (in_words and prompt[0] in begun):
        return _with_system(record, begun)
    if begun and begun[0]["role"] != "assistant":
        raise DataError(f"{record.place}: 'chosen' and 'rejected' begin with another conversation than {field!r}")
    return [*_with_system(record, prompt), *begun]


def messages_of(record: Record, field: str) -> Messages:
    """A field that holds a list of messages."""
    value = record.field(field)
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.place}: field {field!r} should be a list of messages")
    return [_message(one, f"{record.place}: {field} {number}") for number, one in enumerate(value, start=1)]


def turns_of(record: Record, field: str, role: str) -> Messages:
    """A field that holds the text of one turn of this role, a message, or a list of messages."""
    value = record.field(field)
    if isinstance(value, Mapping):
        return [_message(value, f"{record.place}: {field}")]
    return messages_of(record, field) if isinstance(value, list) else [{"role": role, "content": record.text(field)}]


def tools_of(record: Record) -> list[Any] | None:
    """The descriptions of tools beside a conversation, a list or JSON of one; None where there are none."""
    value = record.fields.get("tools") or None
    if value is None:
        return None
    value = _parsed(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise DataError(f"{record.place}: field 'tools' should be a list of tools, or JSON of one")
    return value


def _with_system(record: Record, messages: Messages) -> Messages:
    """With the system prompt that stands beside the messages."""
    if not record.fields.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise DataError(f"{record.place}: field 'system' stands beside a message of role system; leave out one")
    return [{"role": "system", "content": record.text("system")}, *messages]


def _message(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError(f"{place}: a message should be an object, not {kind_of(given)}")
    message = {key: value for key, value in given.items() if value is not None}
    for old, new in (("from", "role"), ("value", "content")):
        if old in message and new not in message:
            message[new] = message.pop(old)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{place}: a message needs a role, such as user or assistant; it has {role!r}")
    for name in ("weight", "train"):
        if name in message:
            raise DataError(f"{place}: {name!r} of single messages is not known; say by objective.train_on what counts")
    message["role"] = _ROLES.get(role, role)
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call, place) for call in _listed(message["tool_calls"], place)]
    else:
        message.pop("tool_calls", None)
    message["content"] = _content(message, place)
    return message


def _content(message: Mapping[str, Any], place: str) -> str:
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if any(not isinstance(part, str) for part in parts):
            raise DataError(f"{place}: the parts of a content should be texts: {{'type': 'text', 'text': ...}}")
        content = "\n".join(map(str, parts))
    if not isinstance(content, str):
        raise DataError(f"{place}: a message needs a content that is text, not {kind_of(content)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: its content holds half a surrogate pair, which no UTF-8 text can") from None
    return content


def _listed(calls: Any, place: str) -> list[Any]:
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{place}: tool_calls should be a list of objects")
    return calls


def _call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A call whose arguments are an object."""
    found = {key: value for key, value in call.items() if value is not None}
    if isinstance(found.get("function"), Mapping):
        return {**found, "function": _call(found["function"], place)}
    if isinstance(found.get("arguments"), str):
        found["arguments"] = _parsed(found["arguments"])
        if not isinstance(found["arguments"], dict):
            raise DataError(f"{place}: the arguments of a call should be an object, or JSON of one")
    return found


def _parsed(text: str) -> Any:
    """What a text of JSON says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
