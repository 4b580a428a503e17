"""Tiny encoders of every family and task, made by transformers, with nothing left at its initial value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from trine.engine.model.pooling import Spans
from trine.engine.model.transformer import Transformer

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_labels": 3,
}


def _bert(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: _make(f"Bert{name}", BertConfig(**{**_SIZES, **changes}))


def _roberta(name: str, config: Any = RobertaConfig, **changes: Any) -> Callable[[], Any]:
    sizes = {**_SIZES, "pad_token_id": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
    class_name = config.__name__.removesuffix("Config")
    return lambda: _make(f"{class_name}{name}", config(**{**sizes, **changes}))


def _distilbert(name: str, **changes: Any) -> Callable[[], Any]:
    sizes = {**_SIZES, "hidden_dim": _SIZES["intermediate_size"]}
    return lambda: _make(f"DistilBert{name}", DistilBertConfig(**{**sizes, **changes}))


def _modernbert(name: str, **changes: Any) -> Callable[[], Any]:
    sizes = {**_SIZES, "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0}
    return lambda: _make(f"ModernBert{name}", ModernBertConfig(**{**sizes, **changes}))


def _make(name: str, config: Any) -> Any:
    config._attn_implementation = "eager"
    return getattr(transformers, name)(config)


_MODERN_SWITCHES = {
    "classifier_bias": True, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "decoder_bias": False,
    "local_attention": 9, "classifier_activation": "relu", "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert_mlm": _bert("ForMaskedLM"),
    "bert_pretraining": _bert("ForPreTraining"),
    "bert_cls": _bert("ForSequenceClassification"),
    "bert_regression": _bert("ForSequenceClassification", num_labels=1, hidden_act="relu"),
    "bert_tagging": _bert("ForTokenClassification"),
    "bert_base": _bert("Model", hidden_act="gelu_new"),
    # Embeddings so small that the epsilon of the norm after them is seen.
    "bert_small_embeddings": _bert("ForMaskedLM"),
    "distilbert_mlm": _distilbert("ForMaskedLM"),
    "distilbert_cls": _distilbert("ForSequenceClassification", activation="relu"),
    "distilbert_tagging": _distilbert("ForTokenClassification"),
    "distilbert_base": _distilbert("Model"),
    "roberta_mlm": _roberta("ForMaskedLM", hidden_act="gelu_new"),
    "roberta_cls": _roberta("ForSequenceClassification"),
    "roberta_tagging": _roberta("ForTokenClassification", type_vocab_size=2),
    "roberta_base": _roberta("Model"),
    "xlm_roberta_mlm": _roberta("ForMaskedLM", XLMRobertaConfig),
    "camembert_cls": _roberta("ForSequenceClassification", CamembertConfig),
    "modernbert_mlm": _modernbert("ForMaskedLM"),
    "modernbert_switches": _modernbert("ForMaskedLM", **_MODERN_SWITCHES),
    "modernbert_untied": _modernbert("ForMaskedLM", tie_word_embeddings=False),
    "modernbert_cls": _modernbert("ForSequenceClassification"),
    "modernbert_cls_mean": _modernbert("ForSequenceClassification", classifier_pooling="mean", **_MODERN_SWITCHES),
    "modernbert_tagging": _modernbert("ForTokenClassification"),
    "modernbert_base": _modernbert("Model", num_hidden_layers=3),
}


# One of each family and task.
MAIN_ENCODERS = {
    "bert_pretraining", "bert_cls", "bert_tagging", "bert_base", "distilbert_mlm", "distilbert_cls",
    "roberta_mlm", "roberta_cls", "modernbert_mlm",
    "modernbert_cls_mean", "modernbert_tagging",
}  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """A transformers model and the folder it was saved to."""

    name: str
    oracle: Any
    folder: Path

    @property
    def takes_types(self) -> bool:
        return not self.name.startswith(("modernbert", "distilbert"))

    def theirs(self, ids: Tensor, **options: Any) -> dict[str, Tensor]:
        """What transformers gives for whole rows: for each token, and for each row."""
        with torch.no_grad():
            return tokens_and_rows(self.oracle(input_ids=ids, **options), self.oracle)


def tokens_and_rows(out: Any, oracle: Any) -> dict[str, Tensor]:
    """The output of a model of transformers by what it is about."""
    if "prediction_logits" in out:
        return {"tokens": out.prediction_logits, "rows": out.seq_relationship_logits}
    if "last_hidden_state" in out:
        pooled = {} if out.get("pooler_output") is None else {"rows": out.pooler_output}
        return {"tokens": out.last_hidden_state, **pooled}
    return {"rows" if "SequenceClassification" in type(oracle).__name__ else "tokens": out.logits}


def ours(model: Transformer, ids: Tensor, spans: Spans, **options: Any) -> dict[str, Tensor]:
    """The same of our model; rows are the sequences of `spans`."""
    hidden_BTC = model(ids, **options)
    head = model.head
    assert head is not None
    if head.config.task == "classification":
        return {"rows": head.class_logits(hidden_BTC, spans)}
    if head.config.task == "tagging":
        return {"tokens": head.tag_logits(hidden_BTC)}
    if head.config.task == "features":
        pooled = {"rows": head.pooled(hidden_BTC, spans)} if head.config.pooler else {}
        return {"tokens": hidden_BTC, **pooled}
    rows = {"rows": head.next_sentence(hidden_BTC, spans)} if head.config.task == "pretraining" else {}
    return {"tokens": model.logits(hidden_BTC), **rows}


@pytest.fixture(scope="session")
def run_ours() -> Callable[..., dict[str, Tensor]]:
    """See `ours`."""
    return ours


@pytest.fixture(scope="session")
def make_encoder(
    tmp_path_factory: pytest.TempPathFactory, perturb_model: Callable[[torch.nn.Module], None]
) -> Callable[[str], Encoder]:
    """By name: a perturbed tiny encoder of transformers, saved once per session."""
    made: dict[str, Encoder] = {}

    def make(name: str) -> Encoder:
        if name not in made:
            torch.manual_seed(0)
            oracle = ENCODERS[name]().float().eval()
            perturb_model(oracle)
            if name == "bert_small_embeddings":
                for parameter in oracle.bert.embeddings.parameters():
                    parameter.data.mul_(0.1)
            folder = tmp_path_factory.mktemp(name)
            oracle.save_pretrained(folder)
            made[name] = Encoder(name, oracle, folder)
        return made[name]

    return make


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest, make_encoder: Callable[[str], Encoder]) -> Encoder:
    """Each tiny encoder in turn."""
    return make_encoder(request.param)


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name in MAIN_ENCODERS else [pytest.mark.slow]) for name in ENCODERS]
)
def main_encoder(request: pytest.FixtureRequest, make_encoder: Callable[[str], Encoder]) -> Encoder:
    """Each tiny encoder in turn; variants of a family are for the slow tests."""
    return make_encoder(request.param)


@pytest.fixture(scope="session")
def texts() -> tuple[Tensor, Tensor]:
    """Token ids [2, 160] and kinds of tokens, far longer than the windows; padding ids are among them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (2, 160), generator=generator)
    return ids, torch.randint(0, 2, (2, 160), generator=generator)
