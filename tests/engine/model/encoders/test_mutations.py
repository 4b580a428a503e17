"""The comparison sees mistakes of encoders: each deliberate one moves an output by more than five tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trine.engine.model import heads
from trine.engine.model.checkpoint import load_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.pooling import Spans, pool, row_spans
from trine.engine.model.transformer import Transformer

Run = Callable[..., dict[str, Tensor]]
Mutation = Callable[[Transformer, pytest.MonkeyPatch], Transformer]


def _with_config(change: Callable[[ModelConfig], ModelConfig]) -> Mutation:
    """The same weights, as far as there is a place for them, under another config."""

    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        changed = Transformer(change(model.config))
        missing, _ = changed.load_state_dict(model.state_dict(), strict=False)
        for name in missing:
            changed.get_parameter(name).data.fill_(0.0 if name.endswith("bias") else 1.0)
        return changed

    return mutate


def _switch(**changes: Any) -> Mutation:
    return _with_config(lambda config: replace(config, **changes))


def _head(**changes: Any) -> Mutation:
    def change(config: ModelConfig) -> ModelConfig:
        assert config.head is not None
        return replace(config, head=replace(config.head, **changes))

    return _with_config(change)


def _transform(**changes: Any) -> Mutation:
    def change(config: ModelConfig) -> ModelConfig:
        assert config.head is not None
        assert config.head.transform is not None
        return replace(config, head=replace(config.head, transform=replace(config.head.transform, **changes)))

    return _with_config(change)


def _fill(ending: str, value: float) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        matching = [p for name, p in model.named_parameters() if name.endswith(ending)]
        assert matching
        for parameter in matching:
            parameter.data.fill_(value)
        return model

    return mutate


def _without(path: str) -> Mutation:
    """A part of the model does nothing."""

    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
        return model

    return mutate


def _swap(one: str, other: str) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        for layer in model.layers:
            first, second = layer.get_parameter(one).data, layer.get_parameter(other).data
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)
        return model

    return mutate


def _norms_inside(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """x + norm(A(x)) in the place of norm(x + A(x))."""
    return _switch(placement="post")(model, monkeypatch)


def _norms_before(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    changed = Transformer(replace(model.config, placement="pre"))
    state = {
        name.replace("post_attention_layernorm", "input_layernorm").replace(
            "post_feedforward_layernorm", "post_attention_layernorm"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    changed.load_state_dict(state)
    return changed


def _first_layer_normed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """By the norm of the second layer's attention, as one that all layers had."""
    changed = Transformer(replace(model.config, first_norm=True))
    second = "layers.1.input_layernorm.weight"
    changed.load_state_dict({**model.state_dict(), second.replace("1", "0"): model.get_parameter(second).data})
    return changed


def _no_tanh(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    def pooled(head: heads.Head, hidden_BTC: Tensor, spans: Spans) -> Tensor:
        assert head.pooler is not None
        out: Tensor = head.pooler(pool(hidden_BTC, spans, ("cls",)))
        return out

    monkeypatch.setattr(heads.Head, "pooled", pooled)
    return model


def _last_token_pooled(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(heads, "pool", lambda hidden, spans, modes: pool(hidden, spans, ("last",)))
    return model


def _thirds_exchanged(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """k and v of the joined matrix taken for one another."""
    return _swap("self_attn.k_proj.weight", "self_attn.v_proj.weight")(model, monkeypatch)


MUTATIONS: list[tuple[str, str, Mutation]] = [
    ("layer norm eps 1e-5 for 1e-12", "bert_small_embeddings", _switch(norm_eps=1e-5)),
    ("tanh gelu for the exact one", "bert_mlm", _switch(activation="gelu_tanh")),
    ("tanh gelu in the head", "bert_mlm", _transform(activation="gelu_tanh")),
    ("exact gelu for the tanh one", "bert_base", _switch(activation="gelu")),
    ("kinds of tokens not added", "bert_mlm", _fill("embed_types.weight", 0.0)),
    ("decoder bias dropped", "bert_mlm", _fill("lm_bias", 0.0)),
    ("norm after the embedding left out", "bert_mlm", _switch(embedding_norm=False)),
    ("norm of the head left out", "bert_mlm", _without("head.transform.norm")),
    ("layer before the vocabulary left out", "bert_mlm", _without("head.transform")),
    ("norms inside the residual", "bert_mlm", _norms_inside),
    ("norms before the branches", "bert_mlm", _norms_before),
    ("a final norm", "bert_mlm", _switch(final_norm=True)),
    ("causal mask", "bert_mlm", _switch(causal=True)),
    ("q bias dropped", "bert_mlm", _fill("q_proj.bias", 0.0)),
    ("output bias dropped", "bert_mlm", _fill("o_proj.bias", 0.0)),
    ("feed-forward bias dropped", "bert_mlm", _fill("down_proj.bias", 0.0)),
    ("norms of a layer exchanged", "bert_mlm", _swap(
        "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"
    )),
    ("pooler without tanh", "bert_cls", _no_tanh),
    ("pooler left out", "bert_cls", _head(pooler=False)),
    ("last token pooled", "bert_cls", _last_token_pooled),
    ("classifier bias dropped", "bert_cls", _fill("classifier.bias", 0.0)),
    ("bias of the next sentence dropped", "bert_pretraining", _fill("next_sentence_output.bias", 0.0)),
    ("bias of tags dropped", "bert_tagging", _fill("classifier.bias", 0.0)),
    ("layer norm eps 1e-5 in DistilBERT", "distilbert_mlm", _switch(norm_eps=1e-5)),
    ("activation of DistilBERT's head", "distilbert_mlm", _transform(activation="gelu_tanh")),
    ("decoder bias of DistilBERT dropped", "distilbert_mlm", _fill("lm_bias", 0.0)),
    ("norms of a DistilBERT layer exchanged", "distilbert_mlm", _swap(
        "post_attention_layernorm.weight", "post_feedforward_layernorm.weight"
    )),
    ("tanh for ReLU before the classes", "distilbert_cls", _head(pooler_activation="tanh")),
    ("layer before the classes of DistilBERT left out", "distilbert_cls", _head(pooler=False)),
    ("positions from 0", "roberta_mlm", _switch(position_offset=0, max_positions=256, pad_has_no_position=False)),
    ("positions from the padding id", "roberta_mlm", _switch(
        position_offset=1, max_positions=255, pad_has_no_position=False
    )),
    ("padding ids counted", "roberta_mlm", _switch(pad_has_no_position=False)),
    ("hidden_act in the head of RoBERTa", "roberta_mlm", _transform(activation="gelu_tanh")),
    ("the one kind of token not added", "roberta_mlm", _fill("embed_types.weight", 0.0)),
    ("decoder bias of RoBERTa dropped", "roberta_mlm", _fill("lm_bias", 0.0)),
    ("classifier of RoBERTa without tanh", "roberta_cls", _no_tanh),
    ("classifier of RoBERTa without its layer", "roberta_cls", _head(pooler=False)),
    ("window of 16 for 8", "modernbert_mlm", _switch(window=17)),
    ("window one too wide on each side", "modernbert_mlm", _switch(window=11)),
    ("window one too narrow on each side", "modernbert_mlm", _switch(window=7)),
    ("window ignored", "modernbert_mlm", _switch(window=None, full_layers=(), window_rope=None)),
    ("pattern of windows shifted", "modernbert_mlm", _switch(full_layers=(2,))),
    ("window behind a token alone", "modernbert_mlm", _switch(causal=True)),
    ("norm before the first attention", "modernbert_mlm", _first_layer_normed),
    ("local theta is the global one", "modernbert_mlm", _switch(window_rope=None)),
    ("global theta is the local one", "modernbert_mlm", _with_config(lambda c: replace(c, rope=c.window_rope))),
    ("tanh gelu of ModernBERT", "modernbert_mlm", _switch(activation="gelu_tanh")),
    ("tanh gelu in the head of ModernBERT", "modernbert_mlm", _transform(activation="gelu_tanh")),
    ("gate and input exchanged", "modernbert_mlm", _swap("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("k and v exchanged", "modernbert_mlm", _thirds_exchanged),
    ("norm after the embedding of ModernBERT left out", "modernbert_mlm", _switch(embedding_norm=False)),
    ("final norm left out", "modernbert_mlm", _switch(final_norm=False)),
    ("norm of the head of ModernBERT left out", "modernbert_mlm", _without("head.transform.norm")),
    ("decoder bias of ModernBERT dropped", "modernbert_mlm", _fill("lm_bias", 0.0)),
    ("bias of norms dropped", "modernbert_switches", _fill("layernorm.bias", 0.0)),
    ("bias of the head's layer dropped", "modernbert_switches", _fill("transform.dense.bias", 0.0)),
    ("head of its own taken for the embedding", "modernbert_untied", _switch(tie_embeddings=True)),
    ("first token for the mean", "modernbert_cls_mean", _head(pooling="cls")),
    ("mean for the first token", "modernbert_cls", _head(pooling="mean")),
    ("layer before the classes left out", "modernbert_cls", _without("head.transform")),
    ("layer before the tags left out", "modernbert_tagging", _without("head.transform")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutation"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_parity_criterion_sees(
    make_encoder: Callable[[str], Any],
    texts: tuple[Tensor, Tensor],
    run_ours: Run,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mutation: Mutation,
) -> None:
    encoder, (ids, _) = make_encoder(name), texts
    theirs = encoder.theirs(ids)
    model = mutation(load_model(encoder.folder), monkeypatch).eval()
    with torch.no_grad():
        ours = run_ours(model, ids, row_spans(torch.ones_like(ids)))
    moved = {what: float((ours[what] - theirs[what]).abs().max()) for what in theirs}
    assert any(moved[what] > 5 * 2e-5 * max(1.0, float(theirs[what].abs().max())) for what in theirs), moved
