"""The model by itself: lengths, dtypes, dropout, activation checkpointing, initial weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from trine.engine.errors import ContextLengthError
from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model
from trine.engine.model.config import DropoutConfig
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer

MakePair = Callable[[str], Any]


def test_too_long_a_sequence_names_both_lengths(make_pair: MakePair) -> None:
    model = load_model(make_pair("llama2").folder)
    with pytest.raises(ContextLengthError, match="513 tokens exceeds this model's context of 512"):
        model(torch.zeros(1, 513, dtype=torch.int64))
    with pytest.raises(ContextLengthError, match="513 tokens"):
        model(torch.zeros(1, 1, dtype=torch.int64), positions_BT=torch.tensor([[512]]))
    cache = KVCache(model.config, 1, 4)
    with pytest.raises(ContextLengthError, match="position 4 does not fit a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)


def test_cache_refuses_segments_and_another_dtype(make_pair: MakePair) -> None:
    model = load_model(make_pair("llama2").folder)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot be used together"):
        model(ids, cache=KVCache(model.config, 1, 4), segment_ids_BT=ids)
    with pytest.raises(ValueError, match=r"keys are torch.float32 but the cache holds torch.bfloat16"):
        model(ids, cache=KVCache(model.config, 1, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_is_that_of_the_hidden_states(make_pair: MakePair, dtype: torch.dtype) -> None:
    model = load_model(make_pair("qwen3").folder)
    hidden = model(torch.zeros(1, 3, dtype=torch.int64), compute_dtype=dtype)
    assert hidden.dtype == dtype
    assert model.logits(hidden).dtype == torch.float32
    hidden.float().sum().backward()
    gradients = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert gradients == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2", "llama_bias", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(
    make_pair: MakePair, sample_ids: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = load_model(make_pair(name).folder).train()
        torch.manual_seed(0)  # GPT-2 drops out here
        model(sample_ids, compute_dtype=dtype, checkpoint_activations=checkpointed).float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) >= 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("place", ["embedding", "attention", "residual"])
def test_dropout_acts_in_training_only(make_pair: MakePair, sample_ids: torch.Tensor, place: str) -> None:
    pair = make_pair("llama2")
    plain = load_model(pair.folder)
    model = Transformer(replace(plain.config, dropout=DropoutConfig(**{place: 0.3})))
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = plain(sample_ids)
        assert torch.equal(model.eval()(sample_ids), expected)
        model.train()
        first, second = model(sample_ids), model(sample_ids)
    assert not torch.equal(first, second)
    assert not torch.equal(first, expected)


def test_initial_weights_depend_on_the_seed_alone(make_pair: MakePair) -> None:
    config = replace(load_model(make_pair("gpt2").folder).config, init_std=0.05)
    one, same, other = Transformer(config), Transformer(config), Transformer(config)
    initialize(one, 3)
    torch.manual_seed(99)
    initialize(same, 3)
    initialize(other, 4)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["embed_tokens.weight"], states[2]["embed_tokens.weight"])
    assert all(bool(tensor.isfinite().all()) for tensor in states[0].values())
    assert float(states[0]["layers.0.mlp.up_proj.weight"].std()) == pytest.approx(0.05, rel=0.05)
    assert float(states[0]["layers.0.mlp.down_proj.weight"].std()) == pytest.approx(0.05 / 2, rel=0.05)
    assert bool((states[0]["layers.0.input_layernorm.weight"] == 1).all())
    assert bool((states[0]["layers.0.self_attn.q_proj.bias"] == 0).all())
