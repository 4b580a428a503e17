"""Folders of encoders: written so that transformers misses nothing, old layouts read, what is not supported named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from trine.engine.errors import CheckpointError, UsageError
from trine.engine.model.checkpoint import load_model, read_config, save_model
from trine.engine.model.cost import count_parameters
from trine.engine.model.families.registry import new_config
from trine.engine.model.head_config import HeadConfig
from trine.engine.model.init import initialize
from trine.engine.model.new_head import load_for_task
from trine.engine.model.pooling import row_spans
from trine.engine.model.transformer import Transformer
from trine.engine.train.recipe_objective import ObjectiveSettings
from trine.engine.train.shape import new_settings

MakeEncoder = Callable[[str], Any]
Run = Callable[..., dict[str, Tensor]]


def _copy(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a folder, with other values in its config.json; ... for none."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    (to / "config.json").write_text(json.dumps(config))
    return to


def _edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _same(model: Transformer, encoder: Any, ids: Tensor, run_ours: Run) -> None:
    spans = row_spans(torch.ones_like(ids))
    with torch.no_grad():
        for what, tensor in run_ours(load_model(encoder.folder), ids, spans).items():
            assert torch.equal(run_ours(model, ids, spans)[what], tensor), what


def test_written_folder_loads_in_transformers(main_encoder: Any, texts: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    save_model(load_model(main_encoder.folder), tmp_path)
    back, info = type(main_encoder.oracle).from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = type(main_encoder)(main_encoder.name, back.eval(), tmp_path)
    for what, tensor in main_encoder.theirs(texts[0]).items():
        assert float((again.theirs(texts[0])[what] - tensor).abs().max()) <= 1e-6, what
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(main_encoder.folder / "model.safetensors"))
    assert not (tmp_path / "generation_config.json").exists()
    labels = (main_encoder.oracle.config.id2label, main_encoder.oracle.config.label2id)
    if main_encoder.name.split("_")[1] in ("cls", "tagging", "regression"):
        assert (back.config.id2label, back.config.label2id) == labels


def test_written_config_reads_back_equal(main_encoder: Any, tmp_path: Path) -> None:
    model = load_model(main_encoder.folder)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert read_config(tmp_path) == model.config
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_parameters_are_counted(encoder: Any) -> None:
    model = load_model(encoder.folder)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


# --- old layouts -----------------------------------------------------------------------------------------------------


def test_old_names_of_norms_and_buffers_are_read(
    make_encoder: MakeEncoder, texts: tuple[Tensor, Tensor], run_ours: Run, tmp_path: Path
) -> None:
    encoder = make_encoder("bert_mlm")
    folder = _copy(encoder.folder, tmp_path / "old", tie_word_embeddings=..., position_embedding_type="absolute")

    def age(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(256)[None].float()
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()

    _edit_tensors(folder, age)
    _same(load_model(folder), encoder, texts[0], run_ours)


@pytest.mark.parametrize("name", ["bert_base", "distilbert_base", "roberta_base", "modernbert_base"])
def test_a_base_class_is_read_with_the_prefix_too(
    make_encoder: MakeEncoder, texts: tuple[Tensor, Tensor], run_ours: Run, tmp_path: Path, name: str
) -> None:
    encoder = make_encoder(name)
    folder = _copy(encoder.folder, tmp_path / "prefixed")
    prefix = encoder.oracle.base_model_prefix
    _edit_tensors(folder, lambda t: t.update({f"{prefix}.{key}": t.pop(key) for key in list(t)}))
    _same(load_model(folder), encoder, texts[0], run_ours)


def test_a_base_class_may_lack_the_pooler(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    folder = _copy(make_encoder("bert_base").folder, tmp_path / "copy")
    _edit_tensors(folder, lambda t: [t.pop(f"pooler.dense.{kind}") for kind in ("weight", "bias")])
    model = load_model(folder)
    assert model.config.head == HeadConfig(task="features")
    save_model(model, tmp_path / "new")
    assert load_model(tmp_path / "new").config == model.config


def test_tensors_of_other_tasks_are_left_unread_and_said(
    make_encoder: MakeEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As bert-base-uncased was published: the pretraining model under the name of the one for masked LM.
    folder = _copy(make_encoder("bert_pretraining").folder, tmp_path / "copy", architectures=["BertForMaskedLM"])
    model = load_model(folder)
    assert "4 tensors are of other tasks and not read: bert.pooler.dense.bias" in capsys.readouterr().err
    oracle = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), oracle(ids).logits, rtol=0, atol=5e-5)


def test_old_settings_of_modernbert_are_read(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    encoder = make_encoder("modernbert_mlm")
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}
    folder = _copy(encoder.folder, tmp_path / "old", layer_types=..., rope_parameters=..., **old)
    assert read_config(folder) == read_config(encoder.folder)
    save_model(load_model(encoder.folder), tmp_path / "new")
    _copy(tmp_path / "new", tmp_path / "stripped", layer_types=..., rope_parameters=...)
    assert read_config(tmp_path / "stripped") == read_config(encoder.folder)


def test_labels_and_problems_are_read(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    folder = make_encoder("bert_cls").folder
    names = {"0": "no", "2": "maybe", "1": "yes"}
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({"id2label": names}, ("no", "yes", "maybe"), "single_label"),
        ({"problem_type": "multi_label_classification"}, ("LABEL_0", "LABEL_1", "LABEL_2"), "multi_label"),
        ({"id2label": ..., "num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2"), "single_label"),
    ]
    for number, (changes, labels, problem) in enumerate(cases):
        head = read_config(_copy(folder, tmp_path / str(number), **changes)).head
        assert head is not None
        assert (head.labels, head.problem) == (labels, problem)
    regression = read_config(make_encoder("bert_regression").folder).head
    assert regression is not None
    assert regression.problem == "regression"


def test_the_activation_of_a_cross_encoder_is_kept(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    name = "torch.nn.modules.linear.Identity"
    notes: list[dict[str, Any]] = [
        {"sentence_transformers": {"activation_fn": name}},
        {"sbert_ce_default_activation_function": name},
    ]
    for number, note in enumerate(notes):
        folder = _copy(make_encoder("bert_regression").folder, tmp_path / str(number), **note)
        save_model(load_model(folder), tmp_path / f"new{number}")
        written = json.loads((tmp_path / f"new{number}" / "config.json").read_text())
        assert written["sentence_transformers"] == {"activation_fn": name}
        assert read_config(tmp_path / f"new{number}") == read_config(folder)


# --- another head ----------------------------------------------------------------------------------------------------


def test_another_head_keeps_the_encoder(
    make_encoder: MakeEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_model(make_encoder("bert_pretraining").folder)
    model = load_for_task(make_encoder("bert_pretraining").folder, "classification", labels=("no", "yes"), seed=3)
    assert "2 tensors of the head for classification are new: head.classifier.bias" in capsys.readouterr().err
    theirs, ours = dict(source.named_parameters()), dict(model.named_parameters())
    new = {"head.classifier.weight", "head.classifier.bias"}
    assert ours.keys() - theirs.keys() == new
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - new)
    assert torch.equal(ours["head.classifier.bias"], torch.zeros(2))
    again = load_for_task(make_encoder("bert_pretraining").folder, "classification", labels=("no", "yes"), seed=3)
    assert torch.equal(again.get_parameter("head.classifier.weight"), ours["head.classifier.weight"])
    save_model(model, tmp_path)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert back.config.id2label == {0: "no", 1: "yes"}


def test_the_same_classes_are_kept_and_others_are_not(make_encoder: MakeEncoder) -> None:
    folder = make_encoder("roberta_cls").folder
    source = load_model(folder).get_parameter("head.classifier.weight")
    same = load_for_task(folder, "classification", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    assert torch.equal(same.get_parameter("head.classifier.weight"), source)
    other = load_for_task(folder, "classification", labels=("a", "b", "c"))
    assert not torch.equal(other.get_parameter("head.classifier.weight"), source)


@pytest.mark.parametrize(
    ("name", "task", "labels", "message"),
    [
        ("roberta_mlm", "pretraining", (), "a roberta model has no head for pretraining; it has masked_lm"),
        ("bert_mlm", "tagging", (), "classification and tagging need them"),
        ("bert_mlm", "masked_lm", ("a",), "others do not"),
        ("bert_mlm", "tagging", ("a", "a"), "each may be there once"),
    ],
)
def test_heads_that_cannot_be_are_refused(
    make_encoder: MakeEncoder, name: str, task: Any, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises((UsageError, CheckpointError), match=message):
        load_for_task(make_encoder(name).folder, task, labels=labels)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert"])
def test_new_models_are_made(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 128, "width": 64, "num_layers": 3, "num_heads": 4, "ffn_width": 96, "max_positions": 64}
    model = Transformer(new_config(family, sizes=sizes, settings={}))
    initialize(model, 0)
    assert model.config.max_positions == 64
    assert model.config.head is not None
    assert model.config.head.task == "masked_lm"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    save_model(model, tmp_path)
    assert load_model(tmp_path).config == model.config


def test_dropout_before_the_classes_of_distilbert_has_a_key_of_its_own(make_encoder: MakeEncoder) -> None:
    rates = {name: read_config(make_encoder(name).folder).head for name in ("distilbert_cls", "distilbert_tagging")}
    assert [head.dropout for head in rates.values() if head is not None] == [0.2, 0.1]
    sizes = {"vocab_size": 128, "width": 64, "num_layers": 1, "num_heads": 4, "max_positions": 64}
    objective = ObjectiveSettings(kind="classification")
    tokenizer: Any = None  # of no use to an encoder
    settings = new_settings(objective, "distilbert", tokenizer, ("no", "yes"), 0.0)
    head = new_config("distilbert", sizes=sizes, settings=settings).head
    assert head is not None
    assert (head.dropout, head.pooler_activation) == (0.0, "relu")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert_mlm", {"is_decoder": True}, "is_decoder = True; only False"),
        ("bert_mlm", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("bert_mlm", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert_mlm", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("bert_mlm", {"hidden_act": "mish"}, "hidden_act 'mish'; supported: silu"),
        ("bert_mlm", {"architectures": ["BertForQuestionAnswering"]}, "supported: BertForMaskedLM, BertForPreTraining"),
        ("bert_mlm", {"hidden_size": 66}, "hidden_size 66, which is not a multiple of num_attention_heads 4"),
        ("bert_cls", {"problem_type": "ranking"}, "problem_type 'ranking'"),
        ("bert_cls", {"id2label": {"0": "a", "2": "b"}}, r"id2label for \[0, 2\]"),
        ("bert_cls", {"id2label": ["a", "b"]}, "expected a name for each of 0, 1, 2"),
        ("bert_cls", {"id2label": None, "num_labels": 10**12}, "num_labels 1000000000000; it must be from 1"),
        ("distilbert_mlm", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds = True; only False"),
        ("distilbert_mlm", {"n_heads": None}, "config.json has no 'n_heads'"),
        ("roberta_mlm", {"max_position_embeddings": 2}, "max_position_embeddings 2, of which 2 stand before the text"),
        ("modernbert_mlm", {"sparse_prediction": True}, "sparse_prediction = True"),
        ("modernbert_cls", {"classifier_pooling": "max"}, "classifier_pooling 'max'; supported: cls, mean"),
        ("modernbert_mlm", {"layer_types": ["full_attention"]}, "expected 4 times"),
    ],
)
def test_what_is_not_supported_is_named(
    make_encoder: MakeEncoder, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(_copy(make_encoder(name).folder, tmp_path / "copy", **changes))


def test_missing_and_unexpected_tensors_are_named(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    folder = _copy(make_encoder("bert_cls").folder, tmp_path / "copy")
    _edit_tensors(folder, lambda t: (t.pop("classifier.bias"), t.update({"extra.weight": torch.ones(2)})))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: classifier\.bias; it holds 1 tensor .*extra\.weight"):
        load_model(folder)


def test_a_decoder_format_cannot_express_the_head_of_an_encoder(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8, "width": 8, "num_layers": 1, "num_heads": 1, "ffn_width": 8, "max_positions": 8}
    config = replace(new_config("llama", sizes=sizes, settings={}), head=HeadConfig(task="tagging", labels=("a",)))
    with pytest.raises(CheckpointError, match="the llama format cannot express a head for tagging"):
        save_model(Transformer(config), tmp_path)


def test_wrong_uses_are_refused(make_encoder: MakeEncoder) -> None:
    model = load_model(make_encoder("bert_mlm").folder)
    ids = torch.ones(2, 4, dtype=torch.int64)
    for options, message in (
        ({"deterministic": True}, "every token sees those after it"),
        ({"mask_BT": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "padding between the tokens"),
        ({"mask_BT": torch.ones(2, 3)}, r"mask_BT is \(2, 3\) for ids \(2, 4\)"),
        ({"mask_BT": torch.ones(2, 4), "segment_ids_BT": ids}, "cannot be used together"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **options)
    assert model.head is not None
    with pytest.raises(ValueError, match="a head for masked_lm has no tags"):
        model.head.tag_logits(model(ids))
    tagging = load_model(make_encoder("bert_tagging").folder)
    with pytest.raises(ValueError, match="a head for tagging has no logits over the vocabulary"):
        tagging.logits(tagging(ids))
    modern = load_model(make_encoder("modernbert_base").folder)
    with pytest.raises(ValueError, match="without token types"):
        modern(ids, token_types_BT=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="has no token; leave it out"):
        row_spans(torch.tensor([[1, 1], [0, 0]]))
