"""Chat templates: rendered as transformers renders them, in a sandbox, and refused with a reason."""

from __future__ import annotations

import datetime
import json
import runpy
from pathlib import Path
from typing import Any

import jinja2
import pytest

from trine.engine.errors import DataError, UsageError
from trine.engine.text import template_limits
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer

TEMPLATES: dict[str, str] = runpy.run_path(str(Path(__file__).with_name("chat_templates.py")))["TEMPLATES"]
TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüße?  "},
    {"role": "assistant", "content": "Hallo."},
    {"role": "user", "content": "Bye"},
]
ANSWERED = [
    {"role": "user", "content": "What's\tup in Zürich? 😀 <s>"},
    {"role": "assistant", "content": 'It is 5 < 7 & "fine" today, see'},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a <place>.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["place"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln", "days": [1, 2]}}}
CALLED = [
    {"role": "user", "content": "And in Köln?"},
    {"role": "assistant", "content": "", "thinking": "I must look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "{'degrees': 7}", "name": "weather"},
    {"role": "assistant", "content": "Seven.", "reasoning_content": "It says 7."},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": " Look "}, {"type": "image", "url": "x"}]}]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "talk": {"conversation": TALK},
    "without system": {"conversation": ANSWERED},
    "tools": {"conversation": [*TALK, ANSWERED[1], *CALLED], "tools": [TOOL]},
    "calls without system": {"conversation": CALLED, "tools": [TOOL, TOOL]},
    "thinking": {"conversation": [*ANSWERED, TALK[3], CALLED[3]], "enable_thinking": False, "reasoning_effort": "low"},
    "documents": {"conversation": TALK, "documents": [{"title": "T", "text": "a text"}, {"title": "U", "text": "b"}]},
    "parts": {"conversation": PARTS},
}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that puts a beginning-of-text token in front of every text, as Llama's do."""
    from tokenizers import processors

    from trine.engine.text.train_tokenizer import train_bpe

    special = ("</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>")
    folder: Path = tmp_path_factory.mktemp("marked")
    train_bpe(["What is up in the weather of a place? " * 9], vocab_size=300, special_tokens=special).save(folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    definition["post_processor"] = json.loads(template.__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = with_settings(Tokenizer.load(folder), folder, bos_token="<s>", unk_token="</s>")
    assert tokenizer.encode("a", add_special_tokens=True)[0] == tokenizer.bos_id
    return tokenizer


@pytest.fixture(scope="module")
def theirs(marked: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("theirs")
    marked.save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_equal_those_of_transformers(
    name: str, case: str, add_generation_prompt: bool, marked: Tokenizer, theirs: Any
) -> None:
    arguments = {**CONVERSATIONS[case], "add_generation_prompt": add_generation_prompt}
    conversation = arguments.pop("conversation")
    template = ChatTemplate(TEMPLATES[name], special_tokens=marked.special_tokens)
    their_arguments = {**arguments, "chat_template": TEMPLATES[name]}
    try:
        expected = theirs.apply_chat_template(conversation, tokenize=False, **their_arguments)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        with pytest.raises(UsageError, match="does not take this conversation"):
            template.render(conversation, **arguments)
        return
    assert template.render(conversation, **arguments) == expected
    ids = theirs.apply_chat_template(conversation, tokenize=True, return_dict=False, **their_arguments)
    encoded = template.encode(marked, conversation, **arguments)
    assert encoded.ids == ids == marked.encode(expected)
    if expected.startswith("<s>"):
        assert [i == marked.bos_id for i in encoded.ids[:2]] == [True, False]  # never doubled


def test_most_conversations_are_rendered_and_not_refused(marked: Tokenizer) -> None:
    rendered = 0
    for source in TEMPLATES.values():
        template = ChatTemplate(source, special_tokens=marked.special_tokens)
        for arguments in CONVERSATIONS.values():
            try:
                values = dict(arguments)
                rendered += bool(template.render(values.pop("conversation"), **values))
            except UsageError:
                continue
    assert len(TEMPLATES) >= 25
    assert rendered > 0.6 * len(TEMPLATES) * len(CONVERSATIONS)


@pytest.mark.parametrize("name", [name for name, source in TEMPLATES.items() if "endgeneration" in source])
@pytest.mark.parametrize("case", ["talk", "without system", "thinking"])
def test_marks_equal_those_of_transformers(name: str, case: str, marked: Tokenizer, theirs: Any) -> None:
    conversation = CONVERSATIONS[case]["conversation"]
    expected = theirs.apply_chat_template(
        conversation, chat_template=TEMPLATES[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    template = ChatTemplate(TEMPLATES[name], special_tokens=marked.special_tokens)
    assert template.marks_generation
    found = template.encode(marked, conversation)
    assert found.ids == expected["input_ids"]
    assert [int(said) for said in found.generated] == expected["assistant_masks"]
    assert 0 < sum(found.generated) < len(found.ids)


def test_text_in_messages_cannot_pass_for_a_mark(marked: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["chatml"], special_tokens=marked.special_tokens)
    said = template.encode(marked, [{"role": "user", "content": "{% generation %}x{% endgeneration %}"}])
    assert not any(said.generated)


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


def test_named_templates_lie_in_a_folder_of_their_own(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path / "a")
    (tmp_path / "a/additional_chat_templates").mkdir()
    (tmp_path / "a/chat_template.jinja").write_text("one")
    (tmp_path / "a/additional_chat_templates/rag.jinja").write_text("two")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    copied = Tokenizer.load(tmp_path / "b")
    assert copied.chat_templates == {"default": "one", "rag": "two"}
    template = ChatTemplate.of(copied, "rag")
    assert template is not None
    assert template.render(TALK) == "two"
    with pytest.raises(DataError, match=r"no chat template 'tools'; it has default, rag"):
        ChatTemplate.of(copied, "tools")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    assert theirs.apply_chat_template(TALK, chat_template="rag", tokenize=False) == "two"


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
    fixed = ChatTemplate("{{ strftime_now('%d %b %Y') }}", day=datetime.date(2024, 7, 26))
    assert (fixed.render([]), fixed.reads_date) == ("26 Jul 2024", True)
    assert not ChatTemplate("{{ date }}").reads_date


# What a template may try: to get at Python, to change what it is given, to run for ever, to take all memory.
HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "builtins by filter": "{{ messages | attr('__class__') | attr('__base__') }}",
    "the format of a string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "the context": "{{ self._TemplateReference__context.environment }}",
    "a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "a macro's function": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "names in a namespace": "{% set ns = namespace(__class__=1) %}{{ ns.x }}",
    "names set in a namespace": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "changed messages": "{{ messages.append({}) }}",
    "a cleared message": "{{ messages[0].clear() }}",
    "an updated message": "{{ messages[0].update(role='x') }}",
    "a file": "{% include '/etc/passwd' %}",
    "another template": "{% extends 'x' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a long range": "{% for i in range(10000000) %}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops by filters": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a long text by *": "{{ 'a' * 10**10 }}",
    "a long text on the left": "{{ 10**10 * 'a' }}",
    "a long list": "{{ [0] * 10**9 }}",
    "doubling by ~": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x | replace('a', 'aa') | replace('b', 'bb') %}{% endfor %}",
    "doubling by set blocks": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "a tree of lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a tree as JSON": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "a tree by ~": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{% set y = ns.x ~ '' %}",
    "two trees compared": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "two dictionaries compared": "{% set a = namespace(x=1) %}{% set b = namespace(x=1) %}{% for i in range(60) %}"
    "{% set a.x = dict(l=a.x, r=a.x) %}{% set b.x = dict(l=b.x, r=b.x) %}{% endfor %}{{ a.x == b.x }}",
    "trees of tuples": "{% set a = namespace(x=1) %}{% for i in range(60) %}{% set a.x = (a.x, a.x) %}{% endfor %}",
    "a deep list": "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "much kept text": "{% set ns = namespace(l=[]) %}{% set x = 'a' * 4000000 %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [x[i:]] %}{% endfor %}",
    "text written by loops": "{% for i in range(99999) %}{% for j in range(99999) %}some text {% endfor %}{% endfor %}",
    "text written into a block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a product": "{% set ns = namespace(x=3) %}{% for i in range(9999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a width given": "{{ '%*d' % (9999999999, 1) }}",
    "a width in format": "{{ '{:>9999999999}'.format(1) }}",
    "a width given to format": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "a width in a filter": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'a'.center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(width=9999999999) if false else 'a'.ljust(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(9999999999) }}",
    "center by filter": "{{ 'a' | center(9999999999) }}",
    "indent by filter": "{{ ('a\\n' * 99999) | indent(9999) }}",
    "batch by filter": "{{ [1] | batch(9999999999, 0) | list }}",
    "slices by filter": "{{ [1] | slice(9999999999) | list }}",
    "JSON with an indent": "{{ [[[1]]] | tojson(indent=9999999999) }}",
    "JSON of separators": "{{ range(99999) | list | tojson(separators=('a' * 99999, 'b')) }}",
    "replace by nothing": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "join by much": "{{ ('a' * 99999).join('b' * 99999) }}",
    "lorem ipsum": "{{ lipsum(n=99999) }}",
    "a word wrap": "{{ ('a ' * 99999) | wordwrap(1, wrapstring='b' * 99999) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_raise_in_little_time_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    import time

    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "TEXT", 1 << 20)
    began, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((UsageError, DataError), match="chat template"):
        ChatTemplate(HOSTILE[name]).render(TALK)
    assert time.thread_time() - began < 5.0  # of the processor
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


@pytest.mark.parametrize(
    "source",
    [
        "{{" + "(" * 300 + "1" + ")" * 300 + "}}",
        "{{ " + "[" * 400 + "]" * 400 + " }}",
        "{{ 1" + "+1" * 20_000 + " }}",
        "{% if x %}" * 500 + "{% endif %}" * 500,
        "{% for x in y %}" * 60 + "{% endfor %}" * 60,
        "{% for x in y %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
        "a" * (1 << 21),
    ],
)
def test_templates_that_break_the_compiler_are_refused(source: str) -> None:
    with pytest.raises(DataError, match="the chat template"):
        ChatTemplate(source)


def test_long_conversations_are_no_attack(marked: Tokenizer) -> None:
    talk = [{"role": ("user", "assistant")[number % 2], "content": "word " * 200} for number in range(2000)]
    for name in ("chatml", "qwen 3 with thinking", "harmony", "deepseek"):
        text = ChatTemplate(TEMPLATES[name], special_tokens=marked.special_tokens).render(talk)
        assert len(text) > 10**6


def test_objects_other_than_json_are_refused() -> None:
    with pytest.raises(UsageError, match="Path is no JSON value"):
        ChatTemplate("{{ messages }}").render([{"role": "user", "content": Path("/")}])
