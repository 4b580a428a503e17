"""The parity criterion sees the mistakes that implementations of encoder-decoders make, each beyond five tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.model import cross_attention, encoder, positions, transformer
from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model
from trine.engine.model.cross_attention import CrossAttention
from trine.engine.model.positions import RelativeBias
from trine.engine.model.transformer import Transformer
from trine.kernels.attention.op import attention, make_mask

Mutation = Callable[[Transformer, pytest.MonkeyPatch], Transformer]


def _switch(**changes: Any) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        changed = Transformer(replace(model.config, **changes))
        changed.load_state_dict(model.state_dict())
        return changed

    return mutate


def _fill(pattern: str, value: float = 0.0) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        matching = [p for name, p in model.named_parameters() if name.endswith(pattern)]
        assert matching
        for parameter in matching:
            parameter.data.fill_(value)
        return model

    return mutate


def _as_causal(of: str, causal: bool) -> Mutation:
    """The buckets of one stack laid out as those of the other kind."""

    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        bias = model.get_submodule(of)
        assert isinstance(bias, RelativeBias)
        bias.causal = causal
        return model

    return mutate


def _one_table(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    assert model.encoder is not None
    assert model.relative_bias is not None
    assert model.encoder.relative_bias is not None
    model.relative_bias.weight.data.copy_(model.encoder.relative_bias.weight.data)
    return model


def _first_layer_alone(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """The bias added in the layer that the file keeps it under, and not in the others."""
    for layers in (model.layers, model.encoder.layers if model.encoder is not None else ()):
        for block in list(layers)[1:]:
            forward = block.forward
            monkeypatch.setattr(block, "forward", lambda x, c, f=forward: f(x, replace(c, biases=None)))
    return model


def _bias_across(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Cross-attention with the decoder's bias by distance."""

    def biased(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert model.relative_bias is not None
        return attention(q, k, v, relative_bias_HR=model.relative_bias(q.shape[2], k.shape[2]), **options)

    monkeypatch.setattr(cross_attention, "attention", biased)
    return model


def _cross_scaled(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.scale = None
    return model


def _interleaved(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    def sinusoids(places: Tensor, width: int) -> Tensor:
        halves = positions.sinusoids(places, width)
        return torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)

    monkeypatch.setattr(transformer, "sinusoids", sinusoids)
    return model


def _from_position(first: int) -> Mutation:
    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        monkeypatch.setattr(transformer, "sinusoids", lambda x, width: positions.sinusoids(x + first, width))
        return model

    return mutate


def _no_positions(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(transformer, "sinusoids", lambda x, width: torch.zeros(*x.shape, width))
    return model


def _norms_inside(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Norms of the decoder inside the branches, after them."""

    def forward(self: Any, x: Tensor, context: Any) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, context))
        x = x + self.cross_attention_layernorm(self.cross_attn(x, context.source))
        y: Tensor = x + self.post_feedforward_layernorm(self.mlp(x))
        return y

    for block in model.layers:
        monkeypatch.setattr(block, "forward", forward.__get__(block))
    return model


def _source_first(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Cross-attention before self-attention."""

    def forward(self: Any, x: Tensor, context: Any) -> Tensor:
        x = self.cross_attention_layernorm(x + self.cross_attn(x, context.source))
        x = self.post_attention_layernorm(x + self.self_attn(x, context))
        y: Tensor = self.post_feedforward_layernorm(x + self.mlp(x))
        return y

    for block in model.layers:
        monkeypatch.setattr(block, "forward", forward.__get__(block))
    return model


def _causal_encoder(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(encoder, "make_mask", lambda **options: make_mask(**{**options, "causal": True}))
    return model


def _padding_seen(where: Any) -> Mutation:
    """The lengths of the sources are not passed on."""

    def mutate(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
        monkeypatch.setattr(where, "make_mask", lambda **options: make_mask(**{**options, "key_lengths_B": None}))
        return model

    return mutate


MUTATIONS: list[tuple[str, str, Mutation]] = [
    ("head scale width^-0.5 missing", "t5_v10", _switch(logit_scale=1.0)),
    ("head scale where there is none", "t5_v11", _switch(logit_scale=64**-0.5)),
    ("scores divided by sqrt(d_kv)", "t5_v10", _switch(attention_scale=None)),
    ("scores over the source divided by sqrt(d_kv)", "t5_v10", _cross_scaled),
    ("relative bias ignored", "t5_v10", _fill("relative_bias.weight")),
    ("relative bias of the first layer alone", "t5_v10", _first_layer_alone),
    ("relative bias over the source", "t5_v10", _bias_across),
    ("one table for both stacks", "t5_v10", _one_table),
    ("max_distance 64", "t5_v10", _switch(relative_max_distance=64)),
    ("buckets of the decoder on both sides", "t5_v10", _as_causal("relative_bias", False)),
    ("buckets of the encoder on one side", "t5_v10", _as_causal("encoder.relative_bias", True)),
    ("causal encoder", "t5_v10", _causal_encoder),
    ("rms eps 1e-4 of T5", "t5_v10", _switch(norm_eps=1e-4)),
    ("gelu for relu of T5", "t5_v10", _switch(activation="gelu")),
    ("exact gelu of T5 1.1", "t5_v11", _switch(activation="gelu")),
    ("padding of the source seen by the encoder", "t5_v10", _padding_seen(encoder)),
    ("padding of the source seen by the decoder", "t5_v10", _padding_seen(cross_attention)),
    ("embeddings of Marian not scaled", "marian", _switch(embedding_scale=1.0)),
    ("embeddings scaled", "marian_relu", _switch(embedding_scale=8.0)),
    ("final_logits_bias ignored", "marian", _fill("lm_bias")),
    ("sines and cosines in turns", "marian", _interleaved),
    ("positions from 1", "marian", _from_position(1)),
    ("no positions", "marian", _no_positions),
    ("norms inside the branches", "marian", _norms_inside),
    ("cross-attention before self-attention", "marian", _source_first),
    ("bias of q over the source dropped", "marian", _fill("cross_attn.q_proj.bias")),
    ("bias of v over the source dropped", "marian", _fill("cross_attn.v_proj.bias")),
    ("layer norm eps 1e-3 of Marian", "marian", _switch(norm_eps=1e-3)),
    ("tanh gelu of Marian", "marian", _switch(activation="gelu_tanh")),
    ("gelu for relu of Marian", "marian_relu", _switch(activation="gelu")),
]


@pytest.mark.parametrize(("name", "mutation"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_parity_criterion_sees(
    make_pair: Callable[[str], Any],
    source_ids: Tensor,
    target_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mutation: Mutation,
) -> None:
    pair, lengths = make_pair(name), torch.tensor([150, 40])
    theirs = pair.oracle_logits(source_ids, target_ids, lengths)
    model = mutation(load_model(pair.folder), monkeypatch).eval()
    with torch.no_grad():
        ours = model.logits(model(target_ids, source=model.encode(source_ids, lengths_B=lengths)))
    _assert_seen(ours, theirs)


def test_cached_decoding_sees_a_bias_from_the_wrong_position(
    make_pair: Callable[[str], Any], source_ids: Tensor, target_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, ids = make_pair("t5_v10"), target_ids[:, :40]
    theirs = pair.oracle_logits(source_ids, ids)
    model = load_model(pair.folder)
    forward = RelativeBias.forward
    monkeypatch.setattr(RelativeBias, "forward", lambda self, queries, keys, first=0: forward(self, queries, keys))
    cache = KVCache(model.config, 2, 40)
    with torch.no_grad():
        source = model.encode(source_ids).keeping()
        parts = [model(ids[:, :30], source=source, cache=cache)]
        parts += [model(ids[:, t : t + 1], source=source, cache=cache) for t in range(30, 40)]
        _assert_seen(model.logits(torch.cat(parts, dim=1)), theirs)


def test_cached_decoding_sees_keys_of_another_layer(
    make_pair: Callable[[str], Any], source_ids: Tensor, target_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair("marian")
    theirs = pair.oracle_logits(source_ids, target_ids)
    model = load_model(pair.folder)
    for block in model.layers:
        monkeypatch.setattr(block.cross_attn, "layer", 0)
    with torch.no_grad():
        ours = model.logits(model(target_ids, source=model.encode(source_ids).keeping()))
    _assert_seen(ours, theirs)


def _assert_seen(ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).abs().max())
    assert difference > 5 * 2e-5 * max(1.0, float(theirs.abs().max()))
