"""Embeddings equal those of sentence-transformers, whose folders are read in both forms and written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import load_model, read_config, save_model
from trine.engine.model.head_config import EmbeddingConfig
from trine.engine.model.pooling import Spans, document_spans, packed_spans, pool, row_spans
from trine.engine.model.transformer import Transformer

TEXTS = ["a b c d e f g", "x", "m n o p m n o p q r s t"]
_SIZES = {
    "vocab_size": 31,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_ALL = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def sentences() -> Any:
    """The modules of sentence-transformers; importing it warns of what it imports itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentence_transformers
        from sentence_transformers.base.modules import dense, normalize, transformer
        from sentence_transformers.sentence_transformer.modules import pooling
    return {
        "SentenceTransformer": sentence_transformers.SentenceTransformer,
        "Transformer": transformer.Transformer,
        "Pooling": pooling.Pooling,
        "Dense": dense.Dense,
        "Normalize": normalize.Normalize,
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, perturb_model: Callable[[nn.Module], None]) -> dict[str, Path]:
    """Folders of base classes with a tokenizer: an encoder of each kind, and a decoder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    made = {}
    for name, config in (
        ("bert", transformers.BertConfig(**_SIZES, max_position_embeddings=64)),
        ("roberta", transformers.RobertaConfig(**_SIZES, max_position_embeddings=66, pad_token_id=0)),
        ("modernbert", transformers.ModernBertConfig(**_SIZES, local_attention=4, pad_token_id=0)),
        ("qwen3", transformers.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16, pad_token_id=0)),
    ):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        perturb_model(model)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
        fast.save_pretrained(made[name])
    return made


def _modules(sentences: Any, base: Path, pooling: Any, *rest: Any) -> Any:
    modules = [sentences["Transformer"](str(base)), sentences["Pooling"](64, pooling), *rest]
    prompts = {"query": "q q ", "document": ""}
    return sentences["SentenceTransformer"](modules=modules, prompts=prompts, device="cpu")


def _tokens(folder: Path) -> tuple[Tensor, Tensor]:
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    batch = fast(TEXTS, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def _padded(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    assert model.head is not None
    with torch.no_grad():
        return model.head.embeddings(model(ids, mask_BT=mask), row_spans(mask))


def _packed(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    assert model.head is not None
    lengths = mask.sum(dim=1)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    with torch.no_grad():
        hidden = model(ids[mask.bool()][None], segment_ids_BT=segments, positions_BT=positions)
        return model.head.embeddings(hidden, packed_spans(lengths.tolist()))


def _write_old_form(folder: Path) -> None:
    """As versions before 6 wrote it."""
    path = folder / "1_Pooling" / "config.json"
    modes = json.loads(path.read_text())["pooling_mode"]
    modes = [modes] if isinstance(modes, str) else modes
    keys = {
        "cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken",
    }  # fmt: skip
    flags = {f"pooling_mode_{key}": mode in modes for mode, key in keys.items()}
    path.write_text(json.dumps({"word_embedding_dimension": 64, **flags}))
    steps = json.loads((folder / "modules.json").read_text())
    for step in steps:
        step["type"] = "sentence_transformers.models." + step["type"].rpartition(".")[2]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))


_CASES: dict[str, tuple[str, Callable[[Any], list[Any]]]] = {
    "mean, normalized": ("bert", lambda st: ["mean", st["Normalize"]()]),
    "cls of RoBERTa": ("roberta", lambda st: ["cls"]),
    "all at once": ("modernbert", lambda st: [_ALL]),
    "dense layers": (
        "bert", lambda st: [("max", "mean"), st["Dense"](128, 32), st["Dense"](32, 16, False, nn.Identity())]
    ),
    "last of a decoder": ("qwen3", lambda st: ["lasttoken", st["Normalize"]()]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(_CASES))
def test_embeddings_equal_sentence_transformers(
    sentences: Any, bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    base, make = _CASES[case]
    pooling, *rest = make(sentences)
    oracle = _modules(sentences, bases[base], pooling, *rest)
    oracle.save_pretrained(str(tmp_path / "new"))
    theirs = oracle.encode(TEXTS, convert_to_tensor=True)
    model = load_model(tmp_path / "new")
    ids, mask = _tokens(bases[base])
    torch.testing.assert_close(_padded(model, ids, mask), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(_packed(model, ids, mask), theirs, rtol=0, atol=1e-5)

    shutil.copytree(tmp_path / "new", tmp_path / "old")
    _write_old_form(tmp_path / "old")
    old = load_model(tmp_path / "old")
    assert torch.equal(_padded(old, ids, mask), _padded(model, ids, mask))
    assert old.head is not None
    assert old.head.config.embedding is not None
    assert (old.head.config.embedding.max_tokens, old.head.config.embedding.lower_case) == (16, True)

    save_model(model, tmp_path / "written")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "new" / name, tmp_path / "written" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        back = sentences["SentenceTransformer"](str(tmp_path / "written"), device="cpu")
    assert float((back.encode(TEXTS, convert_to_tensor=True) - theirs).abs().max()) <= 1e-6
    assert back.prompts == oracle.prompts
    assert read_config(tmp_path / "written") == model.config


def test_settings_of_the_folder_are_read(sentences: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    _modules(sentences, bases["bert"], "mean", sentences["Normalize"]()).save_pretrained(str(tmp_path))
    head = read_config(tmp_path).head
    assert head is not None
    assert head.embedding is not None
    assert dict(head.embedding.prompts) == {"query": "q q ", "document": ""}
    assert replace(head.embedding, prompts=()) == EmbeddingConfig(normalize=True, max_tokens=64)


def _edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt = false"),
        ("1_Pooling/config.json", {"embedding_dimension": 32}, "pools 32 numbers, but the model has 64"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode 'median'; supported: cls, max, mean"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual = True; only False"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation_function 'os.system'; supported"),
        ("2_Dense/config.json", {"in_features": 7}, "a Dense step from 7 numbers after one of 64"),
        ("config_sentence_transformers.json", {"default_prompt_name": "title"}, "default_prompt is 'title'"),
        ("config_sentence_transformers.json", {"prompts": ["query"]}, "do not describe a sentence encoder"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "do not describe a sentence encoder"),
    ],
)
def test_steps_that_are_not_supported_are_named(
    sentences: Any, bases: dict[str, Path], tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    _modules(sentences, bases["bert"], "mean", sentences["Dense"](64, 16)).save_pretrained(str(tmp_path))
    _edit(tmp_path / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["Transformer", "Pooling", "LayerNorm"], "has the steps Transformer, Pooling, LayerNorm; supported"),
        (["Transformer", "Normalize", "Pooling"], "in this order"),
        (["Transformer", "../../Pooling"], "names a path outside its folder"),
        ("Transformer", "holds a str, not a JSON list"),
    ],
)
def test_steps_in_another_order_are_refused(bases: dict[str, Path], tmp_path: Path, steps: Any, message: str) -> None:
    shutil.copytree(bases["bert"], tmp_path / "copy")
    if isinstance(steps, list):
        steps = [{"type": f"x.{step.rpartition('/')[2]}", "path": step if n else ""} for n, step in enumerate(steps)]
    (tmp_path / "copy" / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "copy")


def test_pooling_equals_its_definition_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 5, generator=generator)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0] * 9, [3, 3, 4, 4, 4, 4, 4, 9, 9]])
    spans = document_spans(segments, padding=9)
    assert spans.length_N.tolist() == [4, 2, 3, 9, 2, 5]
    rows = [hidden.flatten(0, 1)[s : s + n].double() for s, n in zip(spans.start_N, spans.length_N, strict=True)]

    def weighted(x: Tensor) -> Tensor:
        weights = torch.arange(1, len(x) + 1, dtype=torch.float64)
        return (x * weights[:, None]).sum(0) / weights.sum()

    definitions: dict[Any, Callable[[Tensor], Tensor]] = {
        "cls": lambda x: x[0],
        "last": lambda x: x[-1],
        "max": lambda x: x.max(0).values,
        "mean": lambda x: x.mean(0),
        "mean_sqrt": lambda x: x.sum(0) / len(x) ** 0.5,
        "weighted_mean": weighted,
    }
    for mode, define in definitions.items():
        expected = torch.stack([define(row) for row in rows])
        torch.testing.assert_close(pool(hidden, spans, (mode,)).double(), expected, rtol=0, atol=1e-6)
    both = pool(hidden, spans, ("mean", "cls"))
    assert torch.equal(both[:, 5:], pool(hidden, spans, ("cls",)))
    none = Spans(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert pool(hidden, none, ("mean",)).shape == (0, 5)
