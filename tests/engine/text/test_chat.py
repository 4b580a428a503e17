"""Chat templates: rendered as transformers renders them, in a sandbox, and refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trine.engine.errors import DataError, UsageError
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüße?  "},
    {"role": "assistant", "content": "Hallo."},
    {"role": "user", "content": "Bye"},
]
# Written in the ways that published templates are: loops with indices, whitespace control, namespaces, filters, tests.
TEMPLATES = {
    "marks around each turn": (
        "{% for message in messages %}\n"
        "    {%- if loop.first and message['role'] != 'system' %}{{ bos_token }}{% endif %}\n"
        "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}\n{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
    ),
    "a namespace and a break": (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- break -%}"
        "{%- endif -%}{%- set ns.n = ns.n + 1 -%}[{{ ns.n }}:{{ m.content | upper }}]{%- endfor -%}"
    ),
    "JSON and marked answers": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_equals_that_of_transformers(
    name: str, add_generation_prompt: bool, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    tiny_tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        TALK, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ours = ChatTemplate(TEMPLATES[name], special_tokens={"bos_token": "", "eos_token": "<|endoftext|>"})
    assert ours.render(TALK, add_generation_prompt=add_generation_prompt) == expected


def with_settings(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Tokenizer:
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return Tokenizer.load(folder)


def test_the_template_is_found_where_transformers_writes_it(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert ChatTemplate.of(tiny_tokenizer) is None
    in_settings = with_settings(tiny_tokenizer, tmp_path / "a", chat_template="one{{ eos_token }}")
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    named = with_settings(tiny_tokenizer, tmp_path / "b", chat_template=several)
    (tmp_path / "a/chat_template.jinja").write_text("three")
    beside = Tokenizer.load(tmp_path / "a")
    found = [ChatTemplate.of(tokenizer) for tokenizer in (in_settings, named, beside)]
    assert [template.render(TALK) for template in found if template] == ["one<|endoftext|>", "two", "three"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ messages[0].content + 1 }}", "does not take this conversation"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "range too big"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_an_error_of_the_request(source: str, said: str) -> None:
    with pytest.raises(UsageError, match="chat template") as raised:
        ChatTemplate(source).render(TALK)
    assert said.lower() in str(raised.value).lower()


def test_a_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(DataError, match="line 2"):
        ChatTemplate("fine\n{% if %}")


def test_the_date_is_formatted() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]).startswith("20")
