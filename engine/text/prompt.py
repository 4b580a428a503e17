"""From a prompt as a caller gives it to ids that a model can start from."""

from __future__ import annotations

from collections.abc import Sequence

from trine.engine.errors import UsageError
from trine.engine.text.tokenizer import Tokenizer


def refuse_one_text(name: str, texts: object) -> None:
    """Raise `UsageError` for a text where a list of them belongs: each of its characters would pass for one."""
    if isinstance(texts, str):
        raise UsageError(f"{name} must be a list of texts, got the one text {texts[:40]!r}; put it in a list")


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> list[int]:
    """Ids of a prompt, never none.

    Texts get the special tokens that the tokenizer puts around a text (such as a beginning-of-text token) unless
    `add_special_tokens` is off; ids are taken as they are. An empty prompt starts from the beginning-of-text token, or
    else the end-of-text token, which stands between documents. Raises `UsageError` where there is neither.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens) if isinstance(prompt, str) else list(prompt)
    if ids:
        return ids
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise UsageError("the prompt is empty and the tokenizer names no bos or eos token to start from; give a prompt")
    return [start]


def encode_source(tokenizer: Tokenizer, source: str | Sequence[int], eos_id: int | None) -> list[int]:
    """Ids of a source of an encoder-decoder, never none: a text gets special tokens as the tokenizer says and ends with
    `eos_id` once (as T5 and Marian are trained); ids are taken as they are.

    Raises `UsageError` for a source without ids.
    """
    if not isinstance(source, str):
        ids = list(source)
    else:
        ids = tokenizer.encode(source, add_special_tokens=True)
        if eos_id is not None and (not ids or ids[-1] != eos_id):
            ids.append(eos_id)
    if not ids:
        raise UsageError("the source is empty and the model names no eos token to end it with; give a source")
    return ids
