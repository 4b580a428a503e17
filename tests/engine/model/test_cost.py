"""Costs equal what is counted on a real model: parameters, FLOPs as torch counts them, bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trine.engine.model.cache import KVCache
from trine.engine.model.checkpoint import load_model
from trine.engine.model.config import ModelConfig
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


def test_training_flops_are_three_times_the_forward(make_pair: Callable[[str], Any]) -> None:
    config = load_model(make_pair("llama3_gqa").folder).config
    assert flops_per_token(config, 128, training=True) == 3 * flops_per_token(config, 128, training=False)


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


def test_kv_bytes_equal_an_allocated_cache(main_pair: Any) -> None:
    config = load_model(main_pair.folder).config
    cache = KVCache(config, 3, 7, dtype=torch.bfloat16)
    allocated = cache.k_LBKSD.nbytes + cache.v_LBKSD.nbytes
    assert allocated == 3 * 7 * kv_bytes_per_token(config, torch.bfloat16)
