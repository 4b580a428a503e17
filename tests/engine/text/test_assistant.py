"""What the assistant said in a rendered conversation, by marks and by prefixes; the styles of our own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from trine.engine.errors import DataError, UsageError
from trine.engine.text.assistant import said_by_assistant, teaches_to_end, turn_end
from trine.engine.text.chat import ChatTemplate, encode_spans
from trine.engine.text.chat_styles import STYLES, with_template
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe

TEMPLATES: dict[str, str] = runpy.run_path(str(Path(__file__).with_name("chat_templates.py")))["TEMPLATES"]
SPECIAL = (
    "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>",
    "<|start_header_id|>", "<|end_header_id|>",
)  # fmt: skip
TALK = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, two."},
]
# What a template makes of the two answers of TALK, the token that ends them included.
SAID = {
    "chatml": ["Two.<|im_end|>", "Yes, two.<|im_end|>"],
    "chatml with a default system prompt": ["Two.<|im_end|>", "Yes, two.<|im_end|>"],
    "llama 2": [" Two. </s>", " Yes, two. </s>"],
    "llama 3": ["Two.<|eot_id|>", "Yes, two.<|eot_id|>"],
    "mistral": ["Two.</s>", "Yes, two.</s>"],
    "gemma": ["Two.<end_of_turn>", "Yes, two.<end_of_turn>"],
    "phi 3": ["Two.<|end|>", "Yes, two.<|end|>"],
    "qwen 2.5 with tools": ["Two.<|im_end|>", "Yes, two.<|im_end|>"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["How many? Two. Sure? Yes, two. " * 9], vocab_size=290, special_tokens=SPECIAL).save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<s>"}))
    return Tokenizer.load(folder)


def template_of(tokenizer: Tokenizer, source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=tokenizer.special_tokens)


@pytest.mark.parametrize("name", SAID)
def test_answers_are_found_with_the_token_that_ends_them(name: str, tokenizer: Tokenizer) -> None:
    template = template_of(tokenizer, TEMPLATES[name])
    text, spans = said_by_assistant(template, tokenizer, TALK)
    assert [text[begin:end] for begin, end in spans] == SAID[name]
    assert said_by_assistant(template, tokenizer, TALK, first=3) == (text, spans[1:])
    end = tokenizer.encode(SAID[name][0])[-1]
    assert turn_end(template, tokenizer) == end
    assert teaches_to_end(template, tokenizer)


def test_prefixes_find_what_marks_say(tokenizer: Tokenizer) -> None:
    marked = template_of(tokenizer, TEMPLATES["chatml"])
    plain = template_of(
        tokenizer, TEMPLATES["chatml"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    assert marked.marks_generation
    assert not plain.marks_generation
    assert said_by_assistant(plain, tokenizer, TALK) == said_by_assistant(marked, tokenizer, TALK)


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(tokenizer: Tokenizer) -> None:
    """The last turn alone has empty reasoning there, so only it can be told apart."""
    template = template_of(tokenizer, TEMPLATES["qwen 3 with thinking"])
    with pytest.raises(UsageError, match="writes message 2 of 4 in another way"):
        said_by_assistant(template, tokenizer, TALK)
    text, [(begin, end)] = said_by_assistant(template, tokenizer, TALK, first=3)
    assert text[begin:end] == "<think>\n\n</think>\n\nYes, two.<|im_end|>"


def test_what_teaches_no_end_is_known(tokenizer: Tokenizer) -> None:
    outside = TEMPLATES["chatml"].replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )  # fmt: skip
    assert not teaches_to_end(template_of(tokenizer, outside), tokenizer)
    nothing = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert not teaches_to_end(template_of(tokenizer, nothing), tokenizer)
    assert turn_end(template_of(tokenizer, nothing), tokenizer) is None


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_written_into_the_tokenizer_and_read_by_transformers(
    style: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    named = with_template(tokenizer, style)
    named.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.chat_template == named.chat_template
    assert tokenizer.chat_template is None
    template = ChatTemplate.of(again)
    assert template is not None
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    [found] = encode_spans(again, [said_by_assistant(template, again, TALK)])
    assert (found.ids, [int(said) for said in found.generated]) == (expected["input_ids"], expected["assistant_masks"])
    assert teaches_to_end(template, again)
    end = "</s>" if style == "plain" else "<|im_end|>"
    said = [i for i, generated in zip(found.ids, found.generated, strict=True) if generated]
    assert again.decode(said, skip_special_tokens=False) == f"Two.{end}Yes, two.{end}"
    # What a chat begins its answer at is what stands before the answer here.
    prompt = template.render(TALK[:-1])
    assert template.render(TALK, add_generation_prompt=False).startswith(prompt + TALK[-1]["content"] + end)


def test_what_is_no_template_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bare = train_bpe(["a b"], vocab_size=258, special_tokens=["</s>"])
    for one, named, message in (
        (bare, "chatml", r"no special token <\|im_start\|>, which 'chatml' writes; take 'plain'"),
        (bare, "vicuna", r"'vicuna' is no chat template; give a file that ends in .jinja, or plain or chatml"),
    ):
        with pytest.raises(UsageError, match=message):
            with_template(one, named)
    with pytest.raises(
        DataError, match=r"no chat template in .*none\.jinja: No such file or directory; check the name"
    ):
        with_template(tokenizer, str(tmp_path / "none.jinja"))
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="cannot be read, line 1"):
        with_template(tokenizer, str(tmp_path / "broken.jinja"))
    (tmp_path / "own.jinja").write_text(TEMPLATES["gemma"])
    assert with_template(tokenizer, str(tmp_path / "own.jinja")).chat_template == TEMPLATES["gemma"]
