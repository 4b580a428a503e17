"""A conversation as the text a model was trained on.

A chat template is a Jinja template that comes with the tokenizer: `chat_template.jinja` and further ones in
`additional_chat_templates/`, or `chat_template` in tokenizer_config.json (a text, or a list of named ones), as
transformers writes them. It is rendered in a sandbox (see `template_limits`): a template can format but neither reach
into Python, nor change what it is given, nor run or grow without end. What templates expect to find there besides Jinja
itself, after transformers' documentation:

    messages, tools, documents, add_generation_prompt, bos_token, eos_token, ...     what is rendered
    raise_exception(message)                                       refuses a conversation; an error of the caller here
    strftime_now(format)                                           the date
    x | tojson(indent=n)                                           JSON as it is, not escaped for HTML
    break, continue                                                in loops
    {% generation %} ... {% endgeneration %}                       marks what the assistant said; see `marked`

The text has the special tokens in it already: it is encoded without adding any, so that no beginning-of-text token is
doubled.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro

from trine.engine.errors import DataError, UsageError
from trine.engine.text.template_limits import Budget, LimitedEnvironment, with_budget
from trine.engine.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]  # first character and the one behind the last
_LONGEST = 1 << 20
_MARK = "generation mark"  # a name that no template can write
# The names under which a message's reasoning is known; templates read one or the other.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """ids of a conversation, and for each whether the assistant said it: whether it has a character of that."""

    ids: list[int]
    generated: list[bool]


class ChatTemplate:
    """A compiled template. `ChatTemplate.of(tokenizer)` takes the tokenizer's own."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, day: datetime.date | None = None
    ) -> None:
        """Compile `source`; `special_tokens` ({"eos_token": "</s>"}) are there by name. Raises `DataError`.

        `day` is what a template takes for today that asks for the date (`reads_date`), None: today.
        """
        self._special_tokens = dict(special_tokens or {})
        if len(source) > _LONGEST:
            raise DataError(f"the chat template has {len(source):,} characters; {_LONGEST:,} are allowed")
        self.marks_generation = "endgeneration" in source
        self.reads_date = "strftime_now" in source
        try:
            self._template = _environment(day).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template cannot be read, line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise DataError(f"the chat template cannot be compiled: {error or type(error).__name__}") from None

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, name: str = "default", *, day: datetime.date | None = None
    ) -> ChatTemplate | None:
        """The template of this name that came with the tokenizer; None where there is none of any name.

        Raises `DataError` naming those there are where there are others.
        """
        templates = tokenizer.chat_templates
        if not templates:
            return None
        if name not in templates:
            raise DataError(f"the tokenizer has no chat template {name!r}; it has {', '.join(sorted(templates))}")
        return cls(templates[name], special_tokens=tokenizer.special_tokens, day=day)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, special tokens included: encode it without adding any.

        Args:
            messages: {"role": ..., "content": ...} each.
            add_generation_prompt: end with what introduces the assistant's answer.
            tools: JSON descriptions of functions, as the template wants them.
            documents: texts to answer from, likewise.
            **variables: whatever else the template reads.

        Raises `UsageError` where the template refuses the conversation, does not fit it, or uses too much.
        """
        values = {**variables, "tools": tools, "documents": documents}
        return self._render(messages, {**values, "add_generation_prompt": add_generation_prompt}, mark=None)

    def marked(self, messages: Sequence[Message], **values: Any) -> tuple[str, list[Span]]:
        """The conversation as text, and the stretches of it that the template marks as generated, in order."""
        mark = secrets.token_hex(16)  # unknown to whoever wrote the template or the messages
        values = {"tools": None, "documents": None, "add_generation_prompt": False, **values}
        parts = self._render(messages, values, mark=mark).split(mark)
        text, spans = parts[0], []
        for said, other in zip(parts[1::2], parts[2::2], strict=True):
            spans.append((len(text), len(text) + len(said)))
            text += said + other
        return text, spans

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], **values: Any) -> EncodedChat:
        """The conversation as ids, with what the template marks as generated, as transformers has it."""
        [encoded] = encode_spans(tokenizer, [self.marked(messages, **values)])
        return encoded

    def _render(self, messages: Sequence[Message], values: dict[str, Any], *, mark: str | None) -> str:
        try:
            given = _plain({**self._special_tokens, **values, "messages": [_named(message) for message in messages]})
            if mark is not None:
                given[_MARK] = mark
            return with_budget(Budget(given), lambda: self._template.render(given))
        except (
            jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
            MemoryError,
        ) as error:  # fmt: skip
            # Whatever a template can raise comes from the conversation it was given, or from the template itself.
            reason = str(error) or type(error).__name__
            raise UsageError(f"the model's chat template does not take this conversation: {reason}") from None


def encode_spans(tokenizer: Tokenizer, rendered: Sequence[tuple[str, Sequence[Span]]]) -> list[EncodedChat]:
    """The ids of rendered conversations, and which of them have a character inside one of the ascending spans."""
    encoded = tokenizer.encode_with_offsets([text for text, _ in rendered])
    chats = []
    for (ids, offsets), (_, spans) in zip(encoded, rendered, strict=True):
        generated, current = [], 0
        for begin, end in offsets:
            while current < len(spans) and spans[current][1] <= begin:
                current += 1
            generated.append(current < len(spans) and spans[current][0] < end)
        chats.append(EncodedChat(ids, generated))
    return chats


def _named(message: Message) -> dict[str, Any]:
    """A message with its reasoning under each name that templates read."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy made of nothing but JSON's types: other objects have methods that no sandbox knows."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _environment(day: datetime.date | None) -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation], to_json=_to_json
    )
    environment.globals.update(raise_exception=_raise, strftime_now=partial(_strftime_now, day))
    return environment


class _Generation(Extension):
    """`{% generation %}`: its body is rendered as it is, between two marks where they are asked for."""

    tags = {"generation"}  # noqa: RUF012  (the base class wants a set)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to the end of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_said", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, context: Context, caller: Macro) -> str:
        mark = context.get(_MARK, "")
        return f"{mark}{caller()}{mark}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(day: datetime.date | None, pattern: str) -> str:
    now = datetime.datetime.now() if day is None else datetime.datetime.combine(day, datetime.time())
    return now.strftime(pattern)
