"""Costs of encoder-decoders equal what is counted on a real model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trine.engine.model.checkpoint import load_model
from trine.engine.model.cost import count_parameters, flops_per_token


def test_parameters_equal_the_sum_over_the_model(pair: Any) -> None:
    model = load_model(pair.folder)
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


def test_flops_equal_a_count_of_the_products(pair: Any, source_ids: torch.Tensor, target_ids: torch.Tensor) -> None:
    model = load_model(pair.folder)
    source_ids, target_ids = source_ids[:, :16], target_ids[:, :16]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as ours, torch.no_grad():
        model.logits(model(target_ids, source=model.encode(source_ids)))
    assert ours.get_total_flops() == flops_per_token(model.config, 16, training=False) * target_ids.numel()
    with FlopCounterMode(display=False) as theirs:
        loss = pair.oracle(input_ids=source_ids, decoder_input_ids=target_ids).logits.sum()
    assert theirs.get_total_flops() == ours.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    pair.oracle.zero_grad(set_to_none=True)
    expected = flops_per_token(model.config, 16, training=True) * target_ids.numel()
    assert theirs.get_total_flops() + backward.get_total_flops() == expected
