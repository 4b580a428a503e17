"""Chat templates of our own for models that come without one, and finding the template that a recipe names.

    plain    headings in words; an answer ends with the tokenizer's end-of-text token, which every model knows
    chatml   <|im_start|>role ... <|im_end|>, for tokenizers that have these two tokens

Both mark what the assistant says by `{% generation %}`. A text begins with the beginning-of-text token where the
tokenizer puts one in front of texts.
"""

from __future__ import annotations

from pathlib import Path

from trine.engine.errors import DataError, UsageError
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer

SUFFIX = ".jinja"
_PLAIN = """{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- '### User:\\n' + message.content + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Assistant:\\n' -}}{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}{{- '\\n\\n' -}}
{%- else -%}
{{- raise_exception('role ' + message.role + ' is none of system, user, assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""
_CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
STYLES = {"plain": _PLAIN, "chatml": _CHATML}
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def read_template(path: str) -> str:
    """The text of a `.jinja` file. Raises `DataError` where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"no chat template in {path}: {error.strerror or error}; check the name") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template {path} is not UTF-8 ({error.reason}); convert it") from None


def with_template(tokenizer: Tokenizer, named: str) -> Tokenizer:
    """The tokenizer with the template that is named: a style, or a `.jinja` file.

    Raises `UsageError` for a name that is neither or a style that the tokenizer lacks tokens for, `DataError` for a
    file that cannot be read or is no template.
    """
    if named.endswith(SUFFIX):
        source = read_template(named)
        ChatTemplate(source)
        return tokenizer.with_chat_template(source)
    if named not in STYLES:
        raise UsageError(f"{named!r} is no chat template; give a file that ends in {SUFFIX}, or {' or '.join(STYLES)}")
    if named == "plain" and tokenizer.eos_id is None:
        raise UsageError("the tokenizer names no eos_token, which the chat template 'plain' ends answers with")
    lacking = [token for token in _CHATML_TOKENS if token not in tokenizer.special_texts]
    if named == "chatml" and lacking:
        raise UsageError(f"the tokenizer has no special token {lacking[0]}, which 'chatml' writes; take 'plain'")
    bos = tokenizer.bos_id
    begins = bos is not None and bos in tokenizer.encode("", add_special_tokens=True)[:1]
    return tokenizer.with_chat_template(("{{- bos_token -}}" if begins else "") + STYLES[named])
