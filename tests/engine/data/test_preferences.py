"""Learning from preferences against the formula in float64, from the log-probabilities of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trine.engine.data.chats import ChatLayout
from trine.engine.data.dpo import Preference, answer_log_probs, reward_measures
from trine.engine.data.examples import Example, Record
from trine.engine.data.preferences import PreferenceBatch, PreferenceTask
from trine.engine.errors import DataError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.families.registry import new_config
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.chat_styles import with_template
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe

PAIRS = [
    ("How many?", "Two.", "I will not say."),
    ("And now?", "Three, I think.", "No."),
    ("Sure?", "Yes", "No, not sure at all."),
]
BETA = 0.3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [" ".join(map(" ".join, PAIRS)) * 5]
    return with_template(train_bpe(texts, vocab_size=290, special_tokens=("</s>",)), "plain")


def task_of(tokenizer: Tokenizer, **changes: Any) -> PreferenceTask:
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    settings: dict[str, Any] = {"seq_len": 96, "pad_id": 0, "packed": False, "truncate": False, **changes}
    return PreferenceTask(layout=ChatLayout(tokenizer=tokenizer, template=template, **settings), reference="")


def examples_of(task: PreferenceTask) -> list[Example]:
    records = [
        Record(f"pairs.jsonl:{n}", {"prompt": asked, "chosen": chosen, "rejected": rejected}, 0)
        for n, (asked, chosen, rejected) in enumerate(PAIRS, start=1)
    ]
    return [example for example in task.encode(records) if example is not None]


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one that differs from it."""
    sizes = {
        "vocab_size": tokenizer.vocab_size, "width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 16, "ffn_width": 48, "max_positions": 96,
    }  # fmt: skip
    model = Transformer(new_config("llama", sizes=sizes, settings={"rms_norm_eps": 1e-5}))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    found = []
    for name in ("before", "now"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp(name)
        save_model(model, folder)
        found.append(folder)
    return found[0], found[1]


def their_log_prob(model: Any, ids: Any, trained: Any) -> torch.Tensor:
    """Summed over what is trained of one conversation, alone in its row, in float64."""
    ids, trained = torch.tensor(ids, dtype=torch.int64), torch.tensor(trained)
    log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
    return log_p[torch.arange(len(ids) - 1), ids[1:]][trained[1:]].sum()  # type: ignore[no-any-return]


def their_loss(folders: tuple[Path, Path], examples: list[Example], smoothing: float) -> tuple[Any, torch.Tensor]:
    """Written out, and the model that it has gradients in."""
    before, now = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders)
    total = torch.zeros((), dtype=torch.float64)
    for ids, trained, other_ids, other_trained in examples:
        gains = [
            their_log_prob(now, *one) - their_log_prob(before, *one).detach()
            for one in ((ids, trained), (other_ids, other_trained))
        ]
        sigma = 1 / (1 + torch.exp(-BETA * (gains[0] - gains[1])))
        total = total - (1 - smoothing) * torch.log(sigma) - smoothing * torch.log(1 - sigma)
    return now, total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_loss_and_gradients_are_those_of_the_formula(
    packed: bool, smoothing: float, tokenizer: Tokenizer, folders: tuple[Path, Path]
) -> None:
    before, now = (load_model(folder, dtype=torch.float32) for folder in folders)
    task = task_of(tokenizer, packed=packed)
    examples = examples_of(task)
    batch = task.make(examples)
    assert batch.counts == (3,)
    assert (len(batch.ids_BT) < 6) == packed
    assert batch.num_tokens == sum(map(task.tokens, examples))
    objective = Preference(beta=BETA, label_smoothing=smoothing, reference=lambda model: nullcontext(before))
    loss, count = objective.loss(now.requires_grad_(), batch)
    theirs, expected = their_loss(folders, examples, smoothing)
    assert count == 3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    found = now.embed_tokens.weight.grad
    assert found is not None
    torch.testing.assert_close(found.double(), theirs.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in before.parameters())


MISTAKES: dict[str, Callable[[PreferenceBatch], PreferenceBatch]] = {
    "chosen and rejected swapped": lambda batch: replace(batch, answers_M=batch.answers_M ^ 1),
    "rejected ones of another pair": lambda batch: replace(
        batch, answers_M=torch.where(batch.answers_M % 2 == 1, (batch.answers_M + 2) % 6, batch.answers_M)
    ),
    "shifted by one": lambda batch: replace(batch, places_M=batch.places_M - 1),
    "end of an answer left out": lambda batch: replace(
        batch, **{name: getattr(batch, name)[batch.targets_M != 0] for name in ("places_M", "targets_M", "answers_M")}
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_batch_would_show(name: str, tokenizer: Tokenizer, folders: tuple[Path, Path]) -> None:
    before, now = (load_model(folder, dtype=torch.float32) for folder in folders)
    task = task_of(tokenizer)
    examples = examples_of(task)
    objective = Preference(beta=BETA, reference=lambda model: nullcontext(before))
    with torch.no_grad():
        loss, _ = objective.loss(now, MISTAKES[name](task.make(examples)))
    _, expected = their_loss(folders, examples, 0.0)
    assert abs(float(loss) - float(expected.detach())) > 1e-2


def test_at_the_beginning_nothing_is_preferred(tokenizer: Tokenizer, folders: tuple[Path, Path]) -> None:
    before = load_model(folders[0], dtype=torch.float32)
    task = task_of(tokenizer, packed=True)
    objective = Preference(beta=BETA, reference=lambda model: nullcontext(before))
    with torch.no_grad():
        loss, _ = objective.loss(before, task.make(examples_of(task)))
    assert float(loss) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert objective.measures() == dict.fromkeys(
        ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"), 0.0
    )
    assert objective.measures() == {}


def test_measures_are_means_over_pairs() -> None:
    found = reward_measures(torch.tensor([[1.0, -1.0], [0.5, 1.0], [3.0, 0.0], [0.0, 0.0]]))
    assert found == {"reward_accuracy": 0.5, "reward_margin": 1.125, "reward_chosen": 1.125, "reward_rejected": 0.0}


def test_log_probabilities_are_sums_over_the_answer(tokenizer: Tokenizer, folders: tuple[Path, Path]) -> None:
    """The same for an answer alone, padded, or beside others in a row."""
    model = load_model(folders[1], dtype=torch.float32)
    found = []
    for packed in (False, True):
        task = task_of(tokenizer, packed=packed)
        with torch.no_grad():
            found.append(answer_log_probs(model, task.make(examples_of(task))))
            alone = [answer_log_probs(model, task.make([example])) for example in examples_of(task)]
        torch.testing.assert_close(found[-1], torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_pair_is_shown_refused_and_cut_as_a_conversation_is(tokenizer: Tokenizer) -> None:
    [example, *_] = examples_of(task_of(tokenizer))
    asked = "### User:\nHow many?\n\n### Assistant:\n"
    expected = f"{asked}⟪Two.</s>⟫\nrejected:\n{asked}⟪I will not say.</s>⟫\n\n"
    assert task_of(tokenizer).shown(example) == expected
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: the conversation has \d+ tokens, data.seq_len leaves room for 9"
    ):
        examples_of(task_of(tokenizer, seq_len=9))
    assert examples_of(task_of(tokenizer, seq_len=9, truncate=True)) == []


def test_what_fills_rows_is_known(tokenizer: Tokenizer) -> None:
    task = task_of(tokenizer)
    examples = examples_of(task)
    batch = task.make(examples)
    assert batch.real_tokens is not None
    lengths = [len(ids) - 1 for one in examples for ids in one[::2]]
    assert (batch.real_tokens.sum(dim=1) <= torch.tensor(lengths)).all()
    assert batch.real_tokens.flatten()[batch.places_M].all()
    alone = task.make(examples[:1])
    assert (alone.real_tokens is None) == (alone.num_tokens == alone.ids_BT.numel())
