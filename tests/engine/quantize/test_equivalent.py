"""Dividing before and multiplying here leaves what a model computes, for every structure that a config can ask for."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from trine.engine.model.blocks import Block
from trine.engine.model.config import Activation, EncoderConfig, ModelConfig, Norm, Placement
from trine.engine.model.layers import LayerNorm, RMSNorm
from trine.engine.model.quantized.scheme import SCHEMES, Scheme, make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.awq import awq_scales
from trine.engine.quantize.equivalent import Place, Tie, apply, divided, places, rescale
from trine.engine.quantize.statistics import InputStatistics

SCHEME = make_scheme("w4a16", group_size="32")


def _model(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    """With grouped heads and biases, every parameter far from its initial value and exact in bfloat16."""
    config = ModelConfig(
        **{
            "family": "llama",
            "vocab_size": 40,
            "width": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "ffn_width": 64,
            "max_positions": 32,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            **changes,
        }
    )
    model = Transformer(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = torch.randn(parameter.shape, generator=generator) * 0.2 + name.endswith("norm.weight")
            parameter.copy_(moved.bfloat16())
    return model.eval()


@torch.no_grad()
def _hidden(model: Transformer) -> Tensor:
    ids_BT = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    return model(ids_BT, source=None if model.encoder is None else model.encode(ids_BT.flip(1)))  # type: ignore[no-any-return]


def _random(place: Place, block: Block) -> Tensor:
    width = block.get_parameter(f"{place.layers[0]}.weight").shape[1]
    generator = torch.Generator().manual_seed(2)
    return place.tie(torch.randn(width, generator=generator, dtype=torch.float64).exp())


ENCODER = EncoderConfig(num_layers=2, num_heads=4, ffn_width=64)
STRUCTURES: dict[str, dict[str, Any]] = {
    **{
        f"{placement}-{norm}": {"placement": placement, "norm": norm}
        for placement in get_args(Placement)
        for norm in get_args(Norm)
    },
    **{f"plain-{name}": {"mlp": "plain", "activation": name} for name in get_args(Activation)},
    **{f"gated-{name}": {"activation": name} for name in get_args(Activation)},
    "one-key-head": {"num_kv_heads": 1},
    "all-key-heads": {"num_kv_heads": 4},
    "learned-positions": {"positions": "learned", "rope": None, "norm": "layer"},
    "no-biases": {"qkv_bias": False, "o_bias": False, "mlp_bias": False},
    "normed-heads": {"qk_norm": "head"},
    **{
        f"encoder-decoder-{placement}": {"placement": placement, "encoder": ENCODER, "decoder_start_token_id": 0}
        for placement in ("pre", "post_sum")
    },
}


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_what_the_model_computes_stays(name: str, stored: torch.dtype) -> None:
    model = _model(**STRUCTURES[name])
    before = _hidden(model)
    for block in (*model.layers, *([] if model.encoder is None else model.encoder.layers)):
        assert isinstance(block, Block)
        for place in places(block):
            kept = {part: block.get_parameter(f"{part}.weight").clone() for part in (place.before, *place.layers)}
            apply(block, place, _random(place, block), stored)
            assert all(not torch.equal(block.get_parameter(f"{part}.weight"), old) for part, old in kept.items())
            norm = block.get_submodule(place.before)
            if isinstance(norm, RMSNorm | LayerNorm):
                assert torch.equal(norm.weight, norm.weight.to(stored).double())
    torch.testing.assert_close(_hidden(model), before, rtol=1e-9, atol=1e-9)


def _found(**changes: Any) -> dict[str, tuple[str, ...]]:
    return {place.before: place.layers for place in places(_model(**changes).layers[0])}  # type: ignore[arg-type]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
UPS = ("mlp.gate_proj", "mlp.up_proj")
INNER = {"self_attn.v_proj": ("self_attn.o_proj",), "mlp.up_proj": ("mlp.down_proj",)}


def test_places_follow_the_structure() -> None:
    assert _found() == {"input_layernorm": QKV, "post_attention_layernorm": UPS, **INNER}
    assert _found(placement="post") == INNER
    assert _found(placement="both") == {"input_layernorm": QKV, "pre_feedforward_layernorm": UPS, **INNER}
    assert _found(placement="parallel") == {"input_layernorm": QKV + UPS, **INNER}
    assert _found(mlp="plain", activation="gelu") == {
        "input_layernorm": QKV,
        "post_attention_layernorm": UPS[1:],
        "self_attn.v_proj": ("self_attn.o_proj",),
    }
    assert "mlp.up_proj" in _found(mlp="plain", activation="relu")
    crossing = {"cross_attn.v_proj": ("cross_attn.o_proj",)}
    assert _found(**STRUCTURES["encoder-decoder-post_sum"]) == {**INNER, **crossing}
    assert _found(**STRUCTURES["encoder-decoder-pre"]) == {
        "input_layernorm": QKV,
        "cross_attention_layernorm": ("cross_attn.q_proj",),
        "post_attention_layernorm": UPS,
        **INNER,
        **crossing,
    }


def test_a_part_of_another_kind_has_no_place_and_no_reader() -> None:
    """A norm that something unknown reads too is left alone."""

    class Other(torch.nn.Module):
        pass

    block: Any = _model(placement="parallel").layers[0]
    block.mlp = Other()
    assert [place.before for place in places(block)] == ["self_attn.v_proj"]
    block = _model().layers[0]
    block.self_attn = Other()
    assert [place.before for place in places(block)] == ["post_attention_layernorm", "mlp.up_proj"]


def test_a_norm_weight_of_zero_and_one_that_would_vanish_stay() -> None:
    model = _model(dtype=torch.float64)
    block: Any = model.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight[0] = 0
        block.input_layernorm.weight[1] = 2e-7
    before = _hidden(model)
    place = places(block)[0]
    apply(block, place, torch.full((32,), 1e4, dtype=torch.float64), torch.float16)
    assert block.input_layernorm.weight[:2].tolist() == [0, 2e-7]
    torch.testing.assert_close(_hidden(model), before, rtol=1e-9, atol=1e-9)


def test_statistics_become_those_of_the_new_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x_XK = torch.randn(700, 24, generator=generator, dtype=torch.float64)
    s_K = torch.randn(24, generator=generator, dtype=torch.float64).exp()
    found, expected = divided(InputStatistics.of(x_XK), s_K), InputStatistics.of(x_XK / s_K)
    assert found.tokens == 700
    for name in ("hessian_KK", "absmean_K", "absmax_K", "sample_XK"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_rescaling_uses_the_layers_that_will_be_quantized() -> None:
    model = _model(torch.float32)
    block: Any = model.layers[0]
    place = places(block)[0]
    inputs = InputStatistics.of(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    asked: list[int] = []

    def rescaling(weights: Any, scheme: Scheme, statistics: InputStatistics, tie: Tie) -> Tensor:
        asked.append(len(weights))
        assert (scheme, statistics) == (SCHEME, inputs)
        return torch.full((32,), 2.0)

    before = block.self_attn.k_proj.weight.clone()
    some = {name: SCHEME for name in place.layers if not name.endswith("k_proj")}
    after = rescale(block, place, rescaling, some, inputs, stored_dtype=torch.bfloat16)
    assert asked == [2]
    torch.testing.assert_close(after.absmax_K, inputs.absmax_K / 2)
    torch.testing.assert_close(block.self_attn.k_proj.weight, 2 * before)
    # Layers that go different ways, and none at all: nothing happens.
    mixed = {**some, "self_attn.q_proj": SCHEMES["w8a16"]}
    for schemes in (mixed, {}):
        assert rescale(block, place, rescaling, schemes, inputs, stored_dtype=torch.bfloat16) is inputs
    assert asked == [2]


def test_scales_found_for_shared_heads_are_shared() -> None:
    block: Any = _model(torch.float32).layers[0]
    place = next(place for place in places(block) if place.before == "self_attn.v_proj")
    inputs = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 3] *= 20
    s_K = awq_scales([block.self_attn.o_proj.weight.detach()], SCHEME, InputStatistics.of(inputs), place.tie)
    heads = s_K.view(2, 2, 16)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert float(heads[0, 0, 3]) > float(heads.median())
