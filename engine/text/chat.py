"""A conversation as the text a model was trained on.

A chat template is a Jinja template that comes with the tokenizer: `chat_template.jinja`, or `chat_template` in
tokenizer_config.json (a text, or a list of named ones of which `default` is taken), as transformers writes them. It is
rendered in Jinja's immutable sandbox, so a template can format but neither reach into Python nor change what it is
given. What templates expect to find there besides Jinja itself, after transformers' documentation:

    messages, add_generation_prompt, bos_token, eos_token, ...     what is rendered
    raise_exception(message)                                       refuses a conversation; an error of the caller here
    strftime_now(format)                                           the date
    x | tojson(indent=n)                                           JSON as it is, not escaped for HTML
    break, continue                                                in loops
    {% generation %} ... {% endgeneration %}                       marks what the assistant said; rendered as it is
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trine.engine.errors import DataError, UsageError
from trine.engine.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. `ChatTemplate.of(tokenizer)` takes the tokenizer's own."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile `source`; `special_tokens` ({"eos_token": "</s>"}) are there by name. Raises `DataError`."""
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template cannot be read, line {error.lineno}: {error.message}") from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that came with the tokenizer; None where there is none."""
        source = tokenizer.chat_template
        return None if source is None else cls(source, special_tokens=tokenizer.special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, special tokens included: encode it without adding any.

        Args:
            messages: {"role": ..., "content": ...} each.
            add_generation_prompt: end with what introduces the assistant's answer.

        Raises `UsageError` where the template refuses the conversation or does not fit it.
        """
        values = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**self._special_tokens, **values)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # Whatever a template can raise comes from the conversation it was given, or from the template itself.
            raise UsageError(f"the model's chat template does not take this conversation: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


class _Generation(Extension):
    """`{% generation %}`: the mark is for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (the base class wants a set)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to the end of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


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


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
