"""Rotations leave what a model computes, and spread outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trine.engine.errors import UsageError
from trine.engine.model.config import ModelConfig
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.hadamard import hadamard, rotate


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 60, 64, 80, 96, 128, 576, 768, 896])
def test_matrices_are_orthogonal_with_entries_of_one_size(order: int) -> None:
    h = hadamard(order)
    torch.testing.assert_close(h @ h.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(h.abs(), torch.full_like(h, order**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [3, 6, 25, 92, 100])
def test_an_unknown_order_is_refused_by_number(order: int) -> None:
    with pytest.raises(UsageError, match=f"order {order} "):
        hadamard(order)


def _model(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    config = ModelConfig(
        **{
            "family": "llama",
            "vocab_size": 40,
            "width": 24,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "ffn_width": 48,
            "max_positions": 32,
            **changes,
        }
    )
    model = Transformer(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + name.endswith("norm.weight"))
    return model.eval()


@torch.no_grad()
def _logits(model: Transformer) -> torch.Tensor:
    ids_BT = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    return model.logits(model(ids_BT))


STRUCTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "offset-scaled": {"norm": "rms_offset", "tie_embeddings": True, "embedding_scale": 5.0},
    "normed-heads": {"qk_norm": "head"},
    "parallel": {"placement": "parallel"},
    "parallel-two": {"placement": "parallel_two"},
    "plain": {"mlp": "plain", "activation": "gelu"},
    "learned-positions": {"positions": "learned", "rope": None},
}


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_what_the_model_computes_stays(name: str) -> None:
    model = _model(**STRUCTURES[name])
    before, kept = _logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    rotate(model)
    after = _logits(model)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    same = {key for key, value in model.state_dict().items() if key in kept and torch.equal(value, kept[key])}
    assert all(any(part in key for part in ("q_norm", "k_norm", "bias")) for key in same)
    assert model.config.tie_embeddings is False


def test_a_model_in_float32_computes_the_same_up_to_rounding() -> None:
    model = _model(torch.float32)
    before = _logits(model)
    rotate(model)
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)


def test_an_outlier_channel_is_spread() -> None:
    model = _model()
    weight_NK = model.layers[0].get_parameter("self_attn.q_proj.weight").detach()
    weight_NK[:, 3] *= 50

    def peak() -> float:
        return float((weight_NK.abs().amax(1) / weight_NK.square().mean(1).sqrt()).mean())

    before = peak()
    rotate(model)
    assert before > 4
    assert peak() < 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm": "layer"}, "layer norm takes means"),
        ({"placement": "both"}, "cannot be rotated"),
        ({"placement": "post"}, "cannot be rotated"),
        ({"width": 25}, "order 25"),
        ({"head_dim": 6}, "order 6"),
    ],
)
def test_a_structure_that_does_not_allow_it_is_refused_untouched(changes: dict[str, Any], match: str) -> None:
    model = _model(**changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=match):
        rotate(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
