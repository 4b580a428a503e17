"""Every objective through the trainer: to the bit, the same in pieces, read by transformers, refused by name."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from trine.engine.errors import DataError, TrineError, UsageError
from trine.engine.train import loop
from trine.engine.train import step as steps
from trine.engine.train.loop import train
from trine.engine.train.recipe import Recipe
from trine.engine.train.resolve import resolve
from trine.engine.train.subject import make_subject

MakeRecipe = Callable[..., Recipe]
# What is learned, by which model.
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "masked-lm": ("bert", {"model": {"dropout": 0.1}}),
    "next-sentence": ("bert", {"objective": {"kind": "masked_lm", "next_sentence": True}}),
    "span-corruption": ("t5", {}),
    "seq2seq-packed": (
        "marian", {"objective": {"kind": "seq2seq", "label_smoothing": 0.1}, "data": {"packing": True},
                   "schedule": {"kind": "noam", "warmup_steps": 4}, "model": {"dropout": 0.1}},
    ),
    "chat": (
        "llama", {"objective": {"kind": "chat", "chat_template": "plain"}, "data": {"seq_len": 128, "packing": True},
                  "model": {"dropout": 0.1}},
    ),
    "classification": ("bert", {"objective": {"kind": "classification"}}),
    "regression": ("bert", {"objective": {"kind": "regression", "label_field": "score"}}),
    "tagging": ("bert", {"objective": {"kind": "tagging"}}),
}  # fmt: skip
CLASSES = {
    "masked-lm": transformers.AutoModelForMaskedLM, "next-sentence": transformers.AutoModelForPreTraining,
    "span-corruption": transformers.AutoModelForSeq2SeqLM, "seq2seq-packed": transformers.AutoModelForSeq2SeqLM,
    "chat": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "tagging": transformers.AutoModelForTokenClassification,
}  # fmt: skip
SCORES = {
    "masked-lm": {"accuracy"}, "next-sentence": {"accuracy", "next_sentence_loss", "next_sentence_accuracy"},
    "span-corruption": {"accuracy"}, "seq2seq-packed": {"accuracy", "exact_match"},
    "chat": set(), "classification": {"accuracy", "f1"}, "regression": {"pearson", "spearman"},
    "tagging": {"accuracy", "f1", "entity_f1"},
}  # fmt: skip
# Two of them show what all must do; the others are slow tests.
QUICK = ("masked-lm", "seq2seq-packed", "chat")


def cases() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def logged(run: Path, *kinds: str) -> list[dict[str, Any]]:
    times = {"seconds", "tokens_per_second", "mfu", "memory_bytes", "joules"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in times} for one in lines if one["kind"] in kinds]


@pytest.mark.parametrize("case", cases())
def test_a_run_continues_to_the_bit_and_transformers_reads_it(
    case: str, objective_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, changes = CASES[case]
    assert train(objective_recipe(tmp_path / "whole", model, **changes)).reason == "finished"
    original = loop.Trainer._one_step

    def one_step(self: loop.Trainer, *args: Any) -> None:
        original(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Trainer, "_one_step", one_step)
    parts = objective_recipe(tmp_path / "parts", model, **changes)
    assert train(parts).reason == "interrupted"
    assert train(parts).reason == "finished"
    assert logged(tmp_path / "parts", "step", "eval") == logged(tmp_path / "whole", "step", "eval")
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    last = logged(tmp_path / "whole", "eval")[-1]
    assert {key for key in last if isinstance(last[key], float)} == SCORES[case] | {"loss"}
    read, info = CLASSES[case].from_pretrained(tmp_path / "whole" / "final", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if case == "classification":
        assert read.config.id2label == {0: "other", 1: "red"}
    card = (tmp_path / "whole" / "final" / "README.md").read_text()
    assert CLASSES[case].__name__ in card


@pytest.mark.parametrize("case", CASES)
def test_pieces_change_no_gradient(case: str, objective_recipe: MakeRecipe, tmp_path: Path) -> None:
    model, changes = CASES[case]
    found = []
    for pieces in (8, 4, 1):
        settings = {**changes, "model": {**changes.get("model", {}), "dropout": 0.0}}
        settings["train"] = {"batch_size": 8, "micro_batch_size": pieces}
        setup = resolve(objective_recipe(tmp_path / "run", model, **settings))
        subject = make_subject(setup)
        micro = steps.micro_batches(setup.stream, first_sample=5, batch_size=8, micro_batch_size=pieces)
        loss = steps.accumulate_gradients(
            subject.model, subject.objective, micro, num_valid=steps.count_valid(micro), seed=0,
            compute_dtype=torch.float32, checkpoint_activations=False,
        )  # fmt: skip
        gradients = [one.grad for one in subject.model.parameters() if one.grad is not None]
        found.append((loss, torch.cat([gradient.flatten() for gradient in gradients])))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=2e-6)


def test_fine_tuning_begins_with_the_encoder_and_a_new_head(
    objective_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(objective_recipe(tmp_path / "base", "bert", train={"steps": 2}))
    tuned = objective_recipe(tmp_path / "tuned", {"init_from": str(tmp_path / "base")}, objective={"kind": "tagging"},
        train={"steps": 60, "batch_size": 8}, eval={"every": 60}, log={"every": 60},
    )  # fmt: skip
    setup = resolve(tuned)
    assert setup.fresh_head
    assert setup.recipe.objective.labels == ("B-colour", "O")
    before = load_file(tmp_path / "base" / "final" / "model.safetensors")
    weights = dict(make_subject(setup).model.named_parameters())
    torch.testing.assert_close(
        weights["embed_tokens.weight"].detach(), before["bert.embeddings.word_embeddings.weight"]
    )
    assert "head.classifier" in capsys.readouterr().err
    train(tuned)
    assert logged(tmp_path / "tuned", "eval")[-1]["entity_f1"] == 1.0
    # Trained further, the head is no new one, and its labels are known.
    again = objective_recipe(tmp_path / "again", {"init_from": str(tmp_path / "tuned")}, objective={"kind": "tagging"},
        train={"steps": 1}, eval={"every": 0},
    )  # fmt: skip
    assert not resolve(again).fresh_head
    more = again.model_copy(
        update={"objective": again.objective.model_copy(update={"labels": ("B-colour", "I-x", "O")})}
    )
    assert resolve(more).fresh_head


SEQ2SEQ, TEXTS = {"kind": "seq2seq"}, {"kind": "classification"}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"objective": {"kind": "causal_lm"}}, r'"causal_lm" is for a decoder .* = "bert" is an encoder'),
    ("t5", {"objective": {"kind": "masked_lm"}}, r'"masked_lm" is for an encoder .* "t5" is an encoder-decoder'),
    ("bert", {"model": {"family": "llama"}}, r'"llama" is a decoder; .* objective.kind = "causal_lm"'),
    ("bert", {"model": {"family": "brt"}}, r"'brt' is not known; .*did you mean 'bert'"),
    ("bert", {"data": {"path": "{}/encoder-decoder"}}, r"names no mask_token"),
    ("bert", {"model": {"family": "roberta"}, "objective": {"next_sentence": True}}, r"next_sentence = false"),
    ("t5", {"data": {"path": "{}/encoder"}}, r"has no sentinels"),
    ("t5", {"data": {"seq_len": 300}}, r"hidden spans, but the tokenizer has 12 sentinels"),
    ("t5", {"objective": {"mask_fraction": 0.2}}, r"mask_fraction has no effect with kind"),
    ("t5", {"data": {"document_mask": True}}, r'document_mask has no effect with objective.kind = "span_corruption"'),
    ("bert", {"objective": {"mask_share": 0.9, "random_share": 0.2}}, r"are 1.1 together"),
    ("bert", {"model": {"vocab_size": 40}}, r"model.vocab_size = 40 is smaller than the tokenizer's"),
    ("bert", {"objective": TEXTS, "model": {"max_positions": 16}}, r"seq_len = 32 exceeds model.max_positions = 16"),
    ("marian", {"objective": SEQ2SEQ, "data": {"target_len": 64}, "model": {"max_positions": 32}}, r"_len = 64 ex"),
    ("marian", {"objective": SEQ2SEQ, "data": {"seq_len": 4}}, r"train.jsonl:\d+: field 'source' has \d+ tokens"),
    ("bert", {"objective": {**TEXTS, "labels": ["red", "blue"]}}, r"label 'other' is none of the 2 labels"),
    ("bert", {"objective": {**TEXTS, "labels": ["red"]}}, r"objective.labels"),
    ("bert", {"objective": {**TEXTS, "label_field": "score"}}, r"label \d.\d+ should be a name or a whole number"),
    ("bert", {"objective": {**TEXTS, "text_field": "txt"}}, r"no field 'txt'"),
    ("bert", {"objective": TEXTS, "eval": {"sample_prompts": ["x"]}}, r"sample_prompts has no effect"),
    ("marian", {"objective": SEQ2SEQ, "distill": {"teacher": "x"}}, r'\[distill\] goes with .* "causal_lm"'),
    ("marian", {"objective": SEQ2SEQ, "schedule": {"kind": "noam"}}, r"set warmup_steps"),
    ("marian", {"objective": SEQ2SEQ, "data": {"path": "{}/nothing.jsonl"}}, r"no file or folder"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "changes", "message"), BAD, ids=[message[:32] for *_, message in BAD])
def test_a_recipe_that_does_not_fit_is_one_clear_line(
    model: str,
    changes: dict[str, Any],
    message: str,
    objective_recipe: MakeRecipe,
    objectives_dir: Path,
    tmp_path: Path,
) -> None:
    changes = json.loads(json.dumps(changes).replace("{}", str(objectives_dir)))
    with pytest.raises(TrineError, match=message) as caught:
        resolve(objective_recipe(tmp_path / "run", model, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_examples_need_something_to_be_evaluated_on(
    objective_recipe: MakeRecipe, objectives_dir: Path, tmp_path: Path
) -> None:
    made = objective_recipe(tmp_path / "run", "bert", objective={"kind": "classification"})
    alone = made.model_copy(update={"data": made.data.model_copy(update={"validation": None})})
    with pytest.raises(UsageError, match=r"give data.validation"):
        resolve(alone)
    with pytest.raises(DataError, match=r"another tokenizer"):
        resolve(
            objective_recipe(
                tmp_path / "run", "bert", eval={"sets": {"other": str(objectives_dir / "encoder-decoder")}}
            )
        )


def test_the_resolved_recipe_gives_the_same_run(objective_recipe: MakeRecipe, tmp_path: Path) -> None:
    from trine.engine.train.recipe import load_recipe, recipe_toml

    for case, (model, changes) in CASES.items():
        setup = resolve(objective_recipe(tmp_path / case, model, **changes))
        (tmp_path / f"{case}.toml").write_text(recipe_toml(setup.recipe))
        again = resolve(load_recipe(tmp_path / f"{case}.toml"))
        assert again.recipe == setup.recipe
        assert again.config == setup.config
        assert again.stream.fingerprint == setup.stream.fingerprint
