"""Sizes that do not fit together are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from trine.engine.errors import UsageError
from trine.engine.model.config import DropoutConfig, ModelConfig, MoeConfig, RopeConfig, default_ffn_width

SIZES: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 32,
    "width": 16,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "ffn_width": 24,
    "max_positions": 8,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"width": 0}, "width is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"norm": "batch"}, "norm is 'batch'; known: rms, rms_offset"),
        ({"placement": "inside"}, "placement is 'inside'"),
        ({"window": 0}, "window is 0"),
        ({"full_layers": (0,)}, "full_layers and window_rope need a window"),
        ({"window": 4, "full_layers": (0,)}, "names every layer"),
        ({"window": 4, "full_layers": (1,)}, r"full_layers is \(1,\); give ascending numbers from 0 to 0"),
        ({"unrotated_layers": (0, 0)}, "unrotated_layers is"),
        ({"positions": "learned", "rope": None, "rope_interleaved": True}, 'belong to positions = "rope"'),
        ({"position_offset": 2}, 'belongs to positions = "learned"'),
        ({"rope": RopeConfig(partial=0.25)}, "turns no pair of the 4 channels"),
        ({"rope": RopeConfig(kind="longrope", short_factors=(1.0,), long_factors=(2.0,))}, "1 factors for 2 pairs"),
        ({"moe": MoeConfig(num_experts=2, top_k=1, ffn_width=8, dense_layers=(3,))}, r"dense_layers is \(3,\)"),
        ({"moe": MoeConfig(num_experts=2, top_k=1, ffn_width=8), "mlp": "plain"}, "experts are gated layers"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1"),
        ({"activation": "mish"}, "activation is 'mish'; known: silu"),
        ({"mlp": "wide"}, "mlp is 'wide'"),
        ({"positions": "learned"}, 'positions = "learned" with rope'),
        ({"rope": None}, 'positions = "rope" with rope = None'),
        ({"qk_norm": "row"}, "qk_norm is 'row'"),
        ({"qk_norm": "full", "norm": "layer"}, 'needs norm = "rms"'),
        ({"eos_token_ids": (-1,)}, "eos_token_ids is -1"),
    ],
)
def test_impossible_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelConfig(**{**SIZES, **changes})


def test_impossible_parts_are_refused() -> None:
    with pytest.raises(UsageError, match="rope kind is 'spiral'"):
        RopeConfig(kind="spiral")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"theta is 0"):
        RopeConfig(theta=0)
    with pytest.raises(UsageError, match=r"high_freq_factor 1.0 must be above"):
        RopeConfig(kind="llama3", high_freq_factor=1.0)
    with pytest.raises(UsageError, match=r"top_k is 3, but there are 2 experts"):
        MoeConfig(num_experts=2, top_k=3, ffn_width=8)
    with pytest.raises(UsageError, match=r"rope partial is 1.5"):
        RopeConfig(partial=1.5)
    with pytest.raises(UsageError, match=r"longrope needs short_factors and long_factors"):
        RopeConfig(kind="longrope")
    with pytest.raises(UsageError, match=r"as many short_factors as long_factors"):
        RopeConfig(kind="longrope", short_factors=(1.0, 2.0), long_factors=(1.0,))
    with pytest.raises(UsageError, match=r"residual dropout is 1.0"):
        DropoutConfig(residual=1.0)


def test_default_ffn_width_has_the_parameters_of_a_plain_layer() -> None:
    assert default_ffn_width(512, "plain") == 2048
    assert default_ffn_width(512, "gated") == 1376
