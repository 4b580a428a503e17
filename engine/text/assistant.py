"""Which part of a rendered conversation the assistant said: what fine-tuning takes the loss of.

A template that marks it by `{% generation %}` is believed. Of any other the parts are found by rendering prefixes:

    before = the messages before a turn, with what introduces an answer        after = the messages up to the turn

The turn is what `after` has beyond `before`: the answer with the token that ends it, and without the white space behind
that token, which nobody generates. This holds where each is the beginning of the next and of the whole conversation. A
template that writes earlier turns otherwise than the last one (that leaves out earlier reasoning, say) is refused where
such a turn is asked for, rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trine.engine.errors import UsageError
from trine.engine.text.chat import ChatTemplate, Message, Span
from trine.engine.text.tokenizer import Tokenizer

ASSISTANT = "assistant"
_EXCHANGE = ({"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "\0"})


def said_by_assistant(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], *, first: int = 0, **values: Any
) -> tuple[str, list[Span]]:
    """The conversation as text, and the stretches of it that the assistant said in `messages[first:]`.

    `values` are the template's (tools). Raises `UsageError` where the template refuses the conversation, or where its
    prefixes do not nest.
    """
    if template.marks_generation:
        text, spans = template.marked(messages, **values)
        return text, spans[len(template.marked(messages[:first], **values)[1]) :] if first else spans
    text = template.render(messages, add_generation_prompt=False, **values)
    spans = []
    for number, message in enumerate(messages):
        if number < first or message["role"] != ASSISTANT:
            continue
        before = template.render(messages[:number], add_generation_prompt=True, **values)
        after = _up_to(template, tokenizer, messages[: number + 1], values)
        if not (after.startswith(before) and text.startswith(after)):
            raise UsageError(
                f"the model's chat template writes message {number + 1} of {len(messages)} in another way where other "
                "messages follow, or no answer is asked for, so what the assistant said cannot be told apart; mark it "
                "by {% generation %} in a template of your own, or train on the last answer alone"
            )
        stripped = after.rstrip()
        spans.append((len(before), len(stripped if stripped.endswith(tokenizer.special_texts) else after)))
    return text, spans


def _up_to(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], values: dict[str, Any]) -> str:
    """Messages as text, without the end-of-text token that some templates put behind a whole conversation."""
    text, end = (
        template.render(messages, add_generation_prompt=False, **values),
        tokenizer.special_tokens.get("eos_token"),
    )
    if end is not None and text.endswith(end):
        asked = template.render(messages, add_generation_prompt=True, **values)
        text = text if asked.startswith(text) else text.removesuffix(end)
    return text


def teaches_to_end(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether what the assistant says ends with a special token in this template, as far as it can be told."""
    try:
        text, spans = said_by_assistant(template, tokenizer, _EXCHANGE)
    except UsageError:
        return True
    return not spans or text[: spans[-1][1]].rstrip().endswith(tokenizer.special_texts)


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that the template writes after an answer, whatever the model's settings name as its end."""
    try:
        text = template.render(_EXCHANGE, add_generation_prompt=False)
    except UsageError:
        return None
    after = tokenizer.encode(text.rpartition("\0")[2].lstrip())[:1]
    return after[0] if after and after[0] in tokenizer.special_ids else None
