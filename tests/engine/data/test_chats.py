"""Conversations as examples: masks and losses of transformers, packing, cutting, and the mistakes that would show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.chats import ChatLayout, ChatTask
from trine.engine.data.examples import Example, ExampleSet, Record
from trine.engine.data.objectives import CausalLM
from trine.engine.errors import DataError
from trine.engine.model.checkpoint import save_model
from trine.engine.model.families.registry import new_config
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.chat_styles import with_template
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe

TURNS = [
    ["How many?", "Two."],
    ["Sure?", "Yes, two.", "And now?", "Three, I think."],
    ["Naïve 😀", "値"],
    ["One", "Two", "Three", "Four", "Five", "Six"],
]


def talk(turns: list[str]) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": one} for n, one in enumerate(turns)]}


def records(*turns: list[str]) -> list[Record]:
    return [Record(f"talks.jsonl:{n}", talk(one), 0) for n, one in enumerate(turns, start=1)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokens = ("</s>", "<|im_start|>", "<|im_end|>")
    bare = train_bpe([" ".join(map(" ".join, TURNS)) * 5], vocab_size=300, special_tokens=tokens)
    return with_template(bare, "chatml")


def task_of(tokenizer: Tokenizer, train_on: str = "assistant", **changes: Any) -> ChatTask:
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    settings: dict[str, Any] = {"seq_len": 128, "pad_id": 0, "packed": False, "truncate": False, **changes}
    return ChatTask(layout=ChatLayout(tokenizer=tokenizer, template=template, **settings), train_on=train_on)


def said(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example[0][example[1]].tolist(), skip_special_tokens=False)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer.save(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def their_labels(theirs: Any, turns: list[str]) -> tuple[list[int], list[int]]:
    """ids and labels as transformers masks them."""
    found = theirs.apply_chat_template(
        talk(turns)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return found["input_ids"], [token if mask else IGNORED for token, mask in pairs]


def test_ids_and_masks_are_those_of_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    for example, turns in zip(task_of(tokenizer).encode(records(*TURNS)), TURNS, strict=True):
        ids, labels = their_labels(theirs, turns)
        assert example is not None
        assert example[0].tolist() == ids
        assert [token if trained else IGNORED for token, trained in zip(*example, strict=True)] == labels
        assert said(tokenizer, example) == "".join(f"{answer}<|im_end|>" for answer in turns[1::2])


def test_what_is_trained_is_what_the_recipe_says(tokenizer: Tokenizer) -> None:
    for train_on, expected in (
        ("last", "Three, I think.<|im_end|>"),
        ("assistant", "Yes, two.<|im_end|>Three, I think.<|im_end|>"),
    ):
        [example] = task_of(tokenizer, train_on).encode(records(TURNS[1]))
        assert example is not None
        assert said(tokenizer, example) == expected
    task = task_of(tokenizer, "all")
    [example] = task.encode(records(TURNS[1]))
    assert example is not None
    assert example[1].tolist() == [False] + [True] * (len(example[0]) - 1)
    assert task.terms(example) == task.tokens(example) == len(example[0]) - 1
    [example] = task_of(tokenizer).encode(records(TURNS[0]))
    assert example is not None
    expected = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n⟪Two.<|im_end|>⟫\n"
    assert task_of(tokenizer).shown(example) == expected


def models(tmp_path: Path, vocab_size: int) -> tuple[Transformer, Any]:
    """The same weights here and in transformers, both float32."""
    sizes = {
        "vocab_size": vocab_size, "width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "ffn_width": 48, "max_positions": 128,
    }  # fmt: skip
    model = Transformer(new_config("llama", sizes=sizes, settings={"rms_norm_eps": 1e-5}))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tmp_path)
    return model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    weight: torch.Tensor = (model if isinstance(model, Transformer) else model.model).embed_tokens.weight
    assert weight.grad is not None
    return weight.grad.clone()


def mistakes(batch: Batch) -> dict[str, torch.Tensor]:
    """Targets as they would be with one mistake each."""
    targets = batch.targets_BT
    late = torch.full_like(targets, IGNORED)
    late[:, 1:] = targets[:, :-1]
    ends = torch.full_like(targets, IGNORED)
    ends[:, :-1] = targets[:, 1:]
    everything = torch.full_like(targets, IGNORED)
    everything[:, :-1] = batch.ids_BT[:, 1:]
    return {
        "shifted by one": late,
        "end of turn left out": torch.where(ends == IGNORED, IGNORED, targets),
        "all trained": torch.where(targets == IGNORED, everything, targets),
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_losses_and_gradients_are_those_of_transformers(
    packed: bool, tokenizer: Tokenizer, theirs: Any, tmp_path: Path
) -> None:
    model, their_model = models(tmp_path, tokenizer.vocab_size)
    task = task_of(tokenizer, packed=packed)
    examples = [example for example in task.encode(records(*TURNS)) if example is not None]
    batch = task.make(examples)
    assert (len(batch.ids_BT) < len(TURNS)) == packed == (batch.segment_ids_BT is not None)
    assert batch.num_tokens == sum(map(task.tokens, examples))
    assert batch.num_valid == sum(map(task.terms, examples))
    loss, count = CausalLM().loss(model, batch)
    total, terms = torch.zeros(()), 0
    for turns in TURNS:
        ids, labels = (torch.tensor(one)[None] for one in their_labels(theirs, turns))
        valid = int((labels[:, 1:] != IGNORED).sum())
        total, terms = total + their_model(input_ids=ids, labels=labels).loss * valid, terms + valid
    assert count == terms
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-4)
    expected = gradients(their_model, total)
    torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-4, atol=1e-4)
    for name, targets in mistakes(batch).items():
        wrong = replace(batch, targets_BT=targets, num_valid=int((targets != IGNORED).sum()))
        loss, _ = CausalLM().loss(model, wrong)
        assert float(abs(gradients(model, loss) - expected).max()) > 1e-2, name


def test_long_conversations_are_refused_or_cut(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    [whole] = task_of(tokenizer).encode(records(TURNS[3]))
    assert whole is not None
    length = len(whole[0])
    with pytest.raises(
        DataError, match=rf"talks.jsonl:1: the conversation has {length} tokens, data.seq_len .* {length - 1}"
    ):
        task_of(tokenizer, seq_len=length - 1).encode(records(TURNS[3]))
    [cut] = task_of(tokenizer, seq_len=length - 4, truncate=True).encode(records(TURNS[3]))
    assert cut is not None
    assert all(np.array_equal(one, other[: length - 4]) for one, other in zip(cut, whole, strict=True))
    assert task_of(tokenizer, seq_len=4, truncate=True).encode(records(TURNS[3])) == [None]


def test_conversations_without_anything_to_learn_are_named_or_counted(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"talks.jsonl:2: no message of role assistant, so nothing to learn"):
        task_of(tokenizer).encode(records(TURNS[0], ["Anyone?"]))
    silent = tokenizer.with_chat_template(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    with pytest.raises(DataError, match=r"talks.jsonl:1: the template makes nothing of this that the assistant said"):
        task_of(silent).encode(records(TURNS[0]))
    strict = tokenizer.with_chat_template("{{ raise_exception('Roles must take turns') }}")
    with pytest.raises(DataError, match=r"talks.jsonl:1: .*does not take this conversation: Roles must take turns"):
        task_of(strict).encode(records(TURNS[0]))
    thinking = tokenizer.with_chat_template(
        "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"talks.jsonl:1: .* writes message 2 of 4 in another way"):
        task_of(thinking).encode(records(TURNS[1]))
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk(one)) for one in (TURNS[0], ["x" * 90, "y"], ["One", "Two"])))
    found = ExampleSet(path, task_of(tokenizer, seq_len=30, truncate=True), tokenizer)
    assert len(found) == 2
    assert "cut to data.seq_len, 1 of 3 examples have nothing to learn from and are left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"3 of 3 examples have nothing to learn from; raise data.seq_len"):
        ExampleSet(path, task_of(tokenizer, seq_len=4, truncate=True), tokenizer)
