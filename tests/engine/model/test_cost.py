"""Costs equal what is counted on a real model: parameters, FLOPs as torch counts them, bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model
from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.cost import count_parameters, flops_per_token, kv_bytes_per_token


def test_parameters_equal_the_sum_over_the_model(pair: Any) -> None:
    model = load_model(pair.folder)
    cost = count_parameters(model.config)
    assert cost.total == sum(p.numel() for p in model.parameters())
    embeddings = [model.embed_tokens] + ([model.embed_positions] if model.embed_positions is not None else [])
    assert cost.embedding == sum(e.weight.numel() for e in embeddings)
    assert cost.without_embedding == cost.total - cost.embedding


def test_forward_flops_equal_a_count_of_the_products(main_pair: Any, sample_ids: torch.Tensor) -> None:
    model = load_model(main_pair.folder)
    # The counter does not know the CPU's fused attention; the plain one is made of products it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(sample_ids))
    counted = counter.get_total_flops() / sample_ids.numel()
    # Learned positions and biases are look-ups and sums: no products. Attention is counted over all pairs.
    everything = replace(model.config, window=None, full_layers=(), window_rope=None)
    assert flops_per_token(everything, sample_ids.shape[1], training=False) == counted


def test_attention_is_counted_over_the_window(make_pair: Callable[[str], Any]) -> None:
    config = load_model(make_pair("gemma3").folder).config
    everything = replace(config, window=None, full_layers=(), window_rope=None)
    hidden = 160 - 8  # keys that a token does not see in each of two layers
    fewer = 2 * 4 * config.num_heads * config.head_dim * hidden
    found, whole = (flops_per_token(one, 160, training=False) for one in (config, everything))
    assert found == whole - fewer
    assert flops_per_token(config, 8, training=False) == flops_per_token(everything, 8, training=False)


def test_training_flops_equal_those_of_transformers(main_pair: Any, sample_ids: torch.Tensor) -> None:
    """Of its plain model, forward and backward: other code, whose attention is products over all pairs."""
    ids = sample_ids[:, :16]
    with FlopCounterMode(display=False) as forward:
        logits = main_pair.oracle(ids).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    main_pair.oracle.zero_grad(set_to_none=True)
    everything = replace(load_model(main_pair.folder).config, window=None, full_layers=(), window_rope=None)
    per_token = {kind: flops_per_token(everything, 16, training=kind == "training") for kind in ("forward", "training")}
    assert forward.get_total_flops() == per_token["forward"] * ids.numel()
    assert forward.get_total_flops() + backward.get_total_flops() == per_token["training"] * ids.numel()


def test_the_34m_llama_by_hand() -> None:
    config = ModelConfig(
        family="llama", vocab_size=8192, width=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
        ffn_width=1376, max_positions=512,
    )  # fmt: skip
    layer = 4 * 512 * 512 + 3 * 512 * 1376
    assert count_parameters(config).total == 2 * 8192 * 512 + 8 * (layer + 2 * 512) + 512
    assert flops_per_token(config, 512, training=True) == 6 * (8 * layer + 8192 * 512) + 12 * 8 * 512 * 512
    assert kv_bytes_per_token(config, torch.bfloat16) == 2 * 8 * 512 * 2


def test_flops_of_the_other_families_by_hand() -> None:
    """What differs: gpt2 has a plain feed-forward layer; qwen3 fewer key/value heads, and heads wider than its share.

    Norms, biases and learned positions are no products and count for nothing.
    """
    sizes: dict[str, Any] = {"vocab_size": 100, "width": 48, "num_layers": 3, "num_heads": 4, "max_positions": 64}
    gpt2 = ModelConfig(
        family="gpt2", **sizes, num_kv_heads=4, head_dim=12, ffn_width=192, norm="layer", positions="learned",
        rope=None, mlp="plain", activation="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=True,
    )  # fmt: skip
    weights = 3 * (4 * 48 * 48 + 2 * 48 * 192) + 100 * 48
    assert flops_per_token(gpt2, 64, training=True) == 6 * weights + 12 * 3 * 64 * 48
    qwen3 = ModelConfig(family="qwen3", **sizes, num_kv_heads=2, head_dim=16, ffn_width=80, qk_norm="head")
    weights = 3 * (48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80) + 100 * 48
    assert flops_per_token(qwen3, 64, training=True) == 6 * weights + 12 * 3 * 64 * 64


SIZES: dict[str, Any] = {
    "family": "any", "vocab_size": 100, "width": 48, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "ffn_width": 80, "max_positions": 64,
}  # fmt: skip
# By hand, for 64 tokens of a sequence: multiplications with weights of one layer, and keys seen in all four layers.
_QKVO, _GATED, _ALL = 48 * 64 + 2 * 48 * 32 + 64 * 48, 3 * 48 * 80, 4 * 64
_EXPERTS = MoeConfig(num_experts=8, top_k=2, ffn_width=24)
BY_HAND: dict[str, tuple[dict[str, Any], int, int]] = {
    "fewer heads for keys": ({}, 4 * (_QKVO + _GATED), _ALL),
    "one head for keys": ({"num_kv_heads": 1}, 4 * (2 * 48 * 64 + 2 * 48 * 16 + _GATED), _ALL),
    "a plain unit": ({"mlp": "plain", "mlp_bias": True}, 4 * (_QKVO + 2 * 48 * 80), _ALL),
    "branches side by side": ({"placement": "parallel"}, 4 * (_QKVO + _GATED), _ALL),
    "norms at heads": ({"placement": "both", "qk_norm": "head"}, 4 * (_QKVO + _GATED), _ALL),
    "no positions in two layers": ({"unrotated_layers": (1, 3)}, 4 * (_QKVO + _GATED), _ALL),
    "a window": ({"window": 8}, 4 * (_QKVO + _GATED), 4 * 8),
    "a window in three of four": ({"window": 8, "full_layers": (3,)}, 4 * (_QKVO + _GATED), 3 * 8 + 64),
    "a window wider than the text": ({"window": 80}, 4 * (_QKVO + _GATED), _ALL),
    # router, and two of eight experts
    "experts": ({"moe": _EXPERTS}, 4 * (_QKVO + 48 * 8 + 2 * 3 * 48 * 24), _ALL),
    # and one that takes every token, with a gate of one output
    "a shared expert": (
        {"moe": replace(_EXPERTS, shared_width=40)},
        4 * (_QKVO + 48 * 8 + 2 * 3 * 48 * 24 + 3 * 48 * 40 + 48),
        _ALL,
    ),
    "experts in three of four": (
        {"moe": replace(_EXPERTS, dense_layers=(0,))},
        4 * _QKVO + _GATED + 3 * (48 * 8 + 2 * 3 * 48 * 24),
        _ALL,
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_flops_of_every_feature_by_hand(name: str, tied: bool) -> None:
    """2 for each weight and for each channel of a key and of a value; training three times; the head tied or not."""
    changes, weights, keys = BY_HAND[name]
    config = ModelConfig(**{**SIZES, "tie_embeddings": tied, **changes})
    forward = 2 * (weights + 48 * 100) + 2 * 2 * 64 * keys
    assert flops_per_token(config, 64, training=False) == forward
    assert flops_per_token(config, 64, training=True) == 3 * forward


def test_kv_bytes_equal_an_allocated_cache(main_pair: Any) -> None:
    config = load_model(main_pair.folder).config
    cache = KVCache(config, 3, 7, dtype=torch.bfloat16)
    allocated = cache.k_LBKSD.nbytes + cache.v_LBKSD.nbytes
    assert allocated == 3 * 7 * kv_bytes_per_token(config, torch.bfloat16)
