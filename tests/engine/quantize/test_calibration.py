"""Samples from files: what they hold, which are held out, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.errors import DataError, UsageError
from trine.engine.quantize.calibration import read_calibration
from trine.engine.quantize.samples import Samples
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def _read(paths: list[Path], tokenizer: Tokenizer, **more: Any) -> tuple[Samples, Samples | None]:
    return read_calibration(paths, tokenizer, **{"context": 64, **more})


def _text(folder: Path, name: str = "a.txt", lines: int = 200) -> Path:
    path = folder / name
    path.write_text("".join(f"def add_{number}(first):\n    return first + {number}\n" for number in range(lines)))
    return path


def test_samples_are_even_cuts_of_the_joined_documents(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    paths = [_text(tmp_path), _text(tmp_path, "b.txt", 3)]
    joined = [
        token
        for path in paths
        for token in [*tiny_tokenizer.encode(path.read_text(), parse_special=False), tiny_tokenizer.eos_id]
    ]
    cuts = [joined[start : start + 32] for start in range(0, len(joined) - 31, 32)]
    found, others = _read(paths, tiny_tokenizer, samples=10, length=32)
    assert others is None
    expected = [cuts[int((number + 0.5) * len(cuts) / 10)] for number in range(10)]
    assert found.ids_ST.tolist() == expected


def test_held_out_samples_are_others(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = _text(tmp_path, lines=400)
    found, others = _read([path], tiny_tokenizer, length=32, held_out=True)
    assert others is not None
    assert (len(found.ids_ST), len(others.ids_ST)) == (128, 16)
    rows = [tuple(row) for row in torch.cat((found.ids_ST, others.ids_ST)).tolist()]
    assert len(set(rows)) == len(rows)
    few, others = _read([_text(tmp_path, lines=40)], tiny_tokenizer, length=32, held_out=True)
    assert others is not None
    assert len(others.ids_ST) == (len(few.ids_ST) + len(others.ids_ST)) // 9


def test_what_was_read_is_told(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = _text(tmp_path)
    about = _read([path], tiny_tokenizer, samples=3)[0].about()
    assert (about["samples"], about["length"]) == (3, 64)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["files"] == [{"name": "a.txt", "bytes": path.stat().st_size, "sha256": digest}]
    path.write_text(path.read_text().replace("def add_0", "def xyz_0"))
    assert _read([path], tiny_tokenizer, samples=3)[0].about() != about


def test_a_beginning_of_text_token_stands_before_every_sample(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    definition = json.loads(tiny_tokenizer._definition)
    special = {"id": "<|endoftext|>", "ids": [0], "tokens": [definition["added_tokens"][0]["content"]]}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": special["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {special["id"]: special},
    }
    name = definition["added_tokens"][0]["content"]
    tokenizer = Tokenizer(json.dumps(definition), settings={"bos_token": name, "eos_token": name})
    found, _ = _read([_text(tmp_path)], tokenizer, samples=5, length=16)
    assert found.ids_ST[:, 0].tolist() == [0] * 5
    assert (found.ids_ST[:, 1:] != 0).all()


def test_conversations_go_through_the_template(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = tmp_path / "chat.jsonl"
    talks = [
        [{"role": "user", "content": f"add {number} to the cat"}, {"role": "assistant", "content": "def add"}]
        for number in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    with pytest.raises(DataError, match="no chat template"):
        _read([path], tiny_tokenizer)
    tokenizer = Tokenizer(tiny_tokenizer._definition, settings={"chat_template": TEMPLATE})
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    found, _ = _read([path], tokenizer, length=40)
    starts = [tokenizer.encode(template.render(talk, add_generation_prompt=False))[:20] for talk in talks]
    assert found.ids_ST[0, :20].tolist() == starts[0]
    assert all(row[:20] in starts for row in found.ids_ST.tolist())


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        ("", {}, "the file is empty"),
        ("the cat", {}, "less than one sample of 64 tokens; give more text"),
        ("the cat sat on the mat\n" * 30, {"samples": 900}, "not 900; give more text"),
        (b"\xff\xfe", {}, "not valid UTF-8"),
    ],
    ids=["empty", "short", "few", "bytes"],
)
def test_data_that_does_not_do_is_refused(
    content: str | bytes, more: dict[str, int], words: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=words):
        _read([path], tiny_tokenizer, **more)


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "chat.jsonl:2: no conversation"), ('{"messages": "x"}', "should be a list"), ("{}", "no conversation")],
    ids=["broken", "text", "other"],
)
def test_a_line_that_is_no_conversation_is_named(
    line: str, words: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}\n' + line + "\n")
    with pytest.raises(DataError, match=words):
        _read([path], Tokenizer(tiny_tokenizer._definition, settings={"chat_template": TEMPLATE}))


@pytest.mark.parametrize(("option", "words"), [({"length": 65}, "context of 64"), ({"samples": 0}, "at least 1")])
def test_settings_out_of_range_are_refused(
    option: dict[str, int], words: str, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    with pytest.raises(UsageError, match=words):
        _read([_text(tmp_path)], tiny_tokenizer, **option)
