"""Mixture of experts with quantized weights in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.moe import ExpertLinear, MixtureOfExperts
from trine.engine.model.quantized.experts import QuantizedExperts, install_experts
from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.moe.groups import group_by_expert
from trine.kernels.moe.matmul import grouped_matmul_reference
from trine.kernels.moe.op import moe_mlp_reference
from trine.kernels.quantized.activations import quantize_reference
from trine.kernels.quantized.packing import pack
from trine.kernels.quantized.reference import product_reference
from trine.kernels.quantized_moe.experts import PackedExperts, float8_experts, join_experts, mxfp4_experts, pack_experts
from trine.kernels.quantized_moe.op import (
    quantized_grouped_forward,
    quantized_grouped_linear,
    quantized_moe_forward,
    quantized_moe_mlp,
)
from trine.kernels.quantized_moe.reference import float8_reference, mxfp4_reference, packed_reference

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16], ids=str
)
# Bits and groups of codes, float8 by form of scales, MXFP4.
FORMS = ("int4 32", "int4 64 zeros", "int4 row", "int8 128 zeros", "int8 row", "fp8 row", "fp8 blocks", "mxfp4")
LIMIT = 0.9
# Whole layers take long: one of each way to decode with every commit, all of them with the slow tests.
LAYERS = [
    form if form in ("int4 64 zeros", "fp8 blocks", "mxfp4") else pytest.param(form, marks=pytest.mark.slow)
    for form in FORMS
]
ACTIVATIONS = [
    name if name in ("swiglu_clamped", "gelu_tanh") else pytest.param(name, marks=pytest.mark.slow)
    for name in GATED_ACTIVATIONS
]
FLOAT8 = torch.float8_e4m3fn
NAMES = ("gate_bias", "up_bias", "down_bias")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts(form: str, e: int, n: int, k: int, seed: int = 0) -> tuple[PackedExperts, Tensor]:
    """Packed weights of about 1 / sqrt(k) and their exact numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    kind, *rest = form.split()
    if kind == "mxfp4":
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), generator=generator, dtype=torch.uint8)
        mx_scales = torch.randint(120, 124, (e, n, k // 32), generator=generator, dtype=torch.uint8)
        return mxfp4_experts(blocks, mx_scales), mxfp4_reference(blocks, mx_scales)
    if kind == "fp8":
        shape = {"row": (e, n, 1), "expert": (e, 1), "blocks": (e, -(-n // 128), -(-k // 128))}[rest[0]]
        scales = (torch.rand(shape, generator=generator) + 0.5) * 4 / (448 * k**0.5)
        codes = quantize_reference(make(e * n, k, seed=seed), FLOAT8).codes.view(e, n, k)
        return float8_experts(codes, scales), float8_reference(codes, scales)
    bits, groups = int(kind[3:]), 1 if rest[0] == "row" else k // int(rest[0])
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (e, n, k), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-half, half, (e, n, groups), generator=generator, dtype=torch.int8) if rest[1:] else None
    scales = ((torch.rand(e, n, groups, generator=generator) + 0.5) / (half * k**0.5)).bfloat16()
    return pack_experts(values, scales, zeros, bits=bits), packed_reference(values, scales, zeros)


def choose(num_tokens: int, num_slots: int, num_experts: int, *, none: bool = False) -> Tensor:
    scores = torch.rand(num_tokens, num_experts + none, generator=torch.Generator().manual_seed(7))
    return scores.topk(num_slots, dim=-1).indices


def plain_grouped(x: Tensor, w: Tensor, rows_of: Tensor, expert_of: Tensor, bias: Tensor | None) -> Tensor:
    """Row by row in the dtype of x; rows of no expert are zero."""
    y = torch.zeros(len(rows_of), w.shape[1], dtype=x.dtype)
    for e in range(len(w)):
        mine = expert_of == e
        y[mine] = product_reference(x[rows_of[mine]], None, w[e].to(x.dtype), None, None if bias is None else bias[e])
    return y


def plain_layer(
    x: Tensor, ids: Tensor, weights: Tensor, layers: tuple[Tensor, ...], biases: tuple[Tensor, ...], activation: str
) -> Tensor:
    """Expert by expert in the dtype of x, as models are usually written."""
    limit = LIMIT if activation == "swiglu_clamped" else None
    gate, up, down = (w.to(x.dtype) for w in layers)
    y = torch.zeros_like(x)
    for e in range(len(up)):
        tokens, slots = torch.where(ids == e)
        bg, bu, bd = (b[e] for b in biases) if biases else (None, None, None)
        h = product_reference(x[tokens], gate[e], up[e], bg, bu, activation, limit)
        one = product_reference(h, None, down[e], None, bd) * weights[tokens, slots, None]
        y = y.index_add(0, tokens, one.to(x.dtype))
    return y


def check_layer(
    compare: Any, form: str, dtype: torch.dtype, sizes: tuple[int, ...], activation: str, *, bias: bool, none: bool
) -> None:
    n, slots, e, c, f = sizes
    made = [experts(form, e, *shape, seed=place) for place, shape in enumerate(((f, c), (f, c), (c, f)))]
    (gate, up, down), exact = (a for a, _ in made), tuple(b for _, b in made)
    x, weights, ids = make(n, c, dtype=dtype), make(n, slots, seed=9).sigmoid(), choose(n, slots, e, none=none)
    biases = tuple(make(e, wide, seed=place) for place, wide in enumerate((f, f, c), 20)) if bias else ()
    named: dict[str, Any] = dict(zip(NAMES, biases, strict=False))
    limit = LIMIT if activation == "swiglu_clamped" else None
    found = quantized_moe_mlp(x, ids, weights, gate, up, down, activation=activation, limit=limit, **named)
    doubled = {name: b.double() for name, b in named.items()}
    expected = moe_mlp_reference(
        x.double(), ids, weights.double(), *exact, activation=activation, limit=limit, **doubled
    )
    plain = plain_layer(x, ids, weights, exact, tuple(b.to(dtype) for b in biases), activation)
    compare.values(f"quantized_moe {form}", found, plain, expected)


# --- decoding ---------------------------------------------------------------------------------------------------------


def diagonal(k: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(k).to(dtype)


@DTYPES
def test_every_float_code_is_exact(dtype: torch.dtype) -> None:
    """Products with unit vectors give the weights themselves: every e4m3 code but NaN, every e2m1 code and scale."""
    groups = group_by_expert(torch.zeros(256, 1, dtype=torch.long), 1)
    codes = torch.arange(256).where(torch.arange(256) % 128 != 127, 0).to(torch.uint8).view(FLOAT8).view(1, 1, 256)
    found = quantized_grouped_linear(diagonal(256, dtype), float8_experts(codes, torch.ones(1)), groups)
    assert torch.equal(found[:, 0].double(), codes.flatten().double())
    bytes_EN = torch.arange(256).view(1, 1, 16, 16).to(torch.uint8)
    scales = torch.tensor([0, 1, 254, 127] + [115 + i for i in range(12)]).to(torch.uint8)
    if dtype == torch.float16:  # what fp16 can hold
        scales[:3] = 126
    scales[2] = min(int(scales[2]), 251)  # 6 times it is finite
    exact = mxfp4_reference(bytes_EN, scales.view(1, 1, 16)).flatten()
    groups = group_by_expert(torch.zeros(512, 1, dtype=torch.long), 1)
    weight = mxfp4_experts(bytes_EN, scales.view(1, 1, 16))
    found = quantized_grouped_linear(diagonal(512, dtype), weight, groups)[:, 0]
    assert torch.equal(found, exact.to(torch.float32).to(dtype))


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "fp8 expert"])
def test_grouped_linear(compare: Any, form: str) -> None:
    """Gathered with several parts of K, then in grouped order without; slots of no expert, bias, K filling no block."""
    for tokens, slots, k, dtype in (
        (5, 2, 384, torch.bfloat16),
        (13, 3, 160, torch.float16),
        (7, 3, 96, torch.float32),
    ):
        if "128" in form:
            k = 384 if k > 200 else 128
        elif "64" in form:
            k = 384 if k > 200 else 192
        weight, exact = experts(form, 3, 19 if dtype != torch.float16 else 18, k)
        ids = choose(tokens, slots, 3, none=True)
        groups = group_by_expert(ids, 3)
        expert_of = ids.flatten()[groups.pair_P.long()]
        gather = dtype != torch.float32
        x = make(tokens if gather else tokens * slots, k, dtype=dtype)
        rows_of = groups.pair_P.long() // slots if gather else torch.arange(tokens * slots)
        bias = make(3, weight.num_features, seed=5) if dtype != torch.float16 else None
        found = quantized_grouped_linear(x, weight, groups, bias_EF=bias, gather=gather)
        low = None if bias is None else bias.to(dtype)
        plain = plain_grouped(x, exact, rows_of, expert_of, low)
        double = None if bias is None else bias.double()
        expected = plain_grouped(x.double(), exact, rows_of, expert_of, double)
        compare.values(f"quantized_grouped {form}", found, plain, expected)
        assert not found[expert_of == 3].any()
        if gather:
            again = grouped_matmul_reference(x.double(), exact, groups, bias_EF=double)
            torch.testing.assert_close(again, expected)


def test_blocks_of_scales_at_the_edges(compare: Any) -> None:
    """Three blocks of features, the last short; tiles of features lie within one."""
    weight, exact = experts("fp8 blocks", 2, 264, 160)
    assert weight.spread == 128
    x, ids = make(2, 160, dtype=torch.float16), torch.tensor([[1], [0]])
    groups = group_by_expert(ids, 2)
    expert_of, rows_of = ids.flatten()[groups.pair_P.long()], groups.pair_P.long()
    found = quantized_grouped_linear(x, weight, groups)
    plain, expected = (plain_grouped(y, exact, rows_of, expert_of, None) for y in (x, x.double()))
    compare.values("quantized_grouped fp8 blocks", found, plain, expected)


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LAYERS)
def test_layer(compare: Any, form: str) -> None:
    """Few pairs, then more of one expert than a tile has rows."""
    sizes = (128, 128) if "128" in form else (64, 64)
    check_layer(compare, form, torch.bfloat16, (2, 2, 3, *sizes), "silu", bias=True, none=True)
    check_layer(compare, form, torch.float16, (18, 1, 1, *sizes), "silu", bias=False, none=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(compare: Any, activation: str) -> None:
    """The end of a product and that of the parts of a split one."""
    for tokens, width in ((3, 160), (9, 32)):
        dtype = torch.float32 if tokens == 3 else torch.bfloat16
        check_layer(compare, "mxfp4", dtype, (tokens, 2, 3, width, 32), activation, bias=True, none=True)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_given_comes_back_from_the_tiles(form: str) -> None:
    weight, exact = experts(form, 3, 150, 192)
    assert weight.words is not None
    codes, scales, zeros = weight.plain(2)
    if weight.kind.startswith("int"):
        found = packed_reference(codes[None], scales[None], None if zeros is None else zeros[None])
        again = join_experts((pack(*weight.plain(e), bits=int(weight.kind[3:])) for e in range(3)), 3)
        assert again.words is not None
        assert torch.equal(again.words, weight.words)
        assert again.scheme == weight.scheme
    elif weight.kind == "fp8":
        found = float8_reference(codes.view(FLOAT8)[None], scales[None])
    else:
        found = mxfp4_reference(codes.view(torch.uint8).view(1, 150, 6, 16), scales[None])
    assert torch.equal(found[0], exact[2])


@pytest.mark.slow
def test_a_mixture_of_a_model_takes_the_kernels() -> None:
    """Its experts replaced by codes compute what their numbers compute in the model's own layer."""
    moe = MoeConfig(num_experts=3, top_k=2, ffn_width=32)
    sizes: dict[str, Any] = {
        "width": 64,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_width": 32,
    }
    config = ModelConfig(family="mixtral", vocab_size=8, max_positions=8, moe=moe, **sizes)
    mixture = MixtureOfExperts(config, lambda _: torch.nn.Identity(), device="cpu", dtype=torch.float32)
    mixture.gate.weight.data = make(3, 64)
    weights = {}
    for place, (name, layer) in enumerate(mixture.experts.named_children()):
        assert isinstance(layer, ExpertLinear)
        e, n, k = layer.weight.shape
        weights[name], exact = experts("int4 32", e, n, k, seed=place)
        layer.weight.data = exact.float()
    x = make(2, 3, 64)
    with torch.no_grad():
        expected = mixture(x)
        install_experts(mixture, "experts", weights)
        assert isinstance(mixture.get_submodule("experts"), QuantizedExperts)
        torch.testing.assert_close(mixture(x), expected, rtol=1e-5, atol=1e-5)


def test_repeats_to_the_bit_and_takes_other_shapes() -> None:
    packed = [experts("int4 32", 3, *shape)[0] for shape in ((32, 64), (32, 64), (64, 32))]
    x, ids, weights = make(6, 64), choose(6, 2, 3), make(6, 2, seed=1)
    y = quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    assert torch.equal(quantized_moe_mlp(x, ids.int(), weights, *packed, activation="silu"), y)
    wide = torch.zeros(2, 3, 128)
    wide[..., ::2] = x.view(2, 3, 64)
    shaped = quantized_moe_mlp(wide[..., ::2], ids.view(2, 3, 2), weights.view(2, 3, 2), *packed, activation="silu")
    assert torch.equal(shaped, y.view(2, 3, 64))
    none = quantized_moe_mlp(x[:0], ids[:0], weights[:0], *packed, activation="silu")
    assert none.shape == (0, 64)
    nobody = quantized_moe_mlp(x, torch.full_like(ids, 3), weights, *packed, activation="silu")
    assert not nobody.any()
    groups = group_by_expert(ids[:0], 3)
    assert quantized_grouped_linear(x[:0], packed[0], groups).shape == (0, 32)


def test_nan_stays_with_its_token() -> None:
    packed = [experts("fp8 row", 2, *shape)[0] for shape in ((16, 32), (16, 32), (32, 16))]
    x, ids = make(4, 32), torch.tensor([[0], [0], [1], [0]])
    x[1, 3] = float("nan")
    y = quantized_moe_mlp(x, ids, torch.ones(4, 1), *packed, activation="silu")
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


# --- registration -----------------------------------------------------------------------------------------------------


def test_registration_and_compiling_whole() -> None:
    packed = [experts("int4 64 zeros", 3, *shape)[0] for shape in ((64, 64), (64, 64), (64, 64))]
    x, ids, weights = make(4, 64), choose(4, 2, 3), make(4, 2, seed=1)
    groups = group_by_expert(ids, 3)
    up = packed[1]
    tensors = [tensor for of in packed for tensor in (of.words, of.scales, of.zeros)]
    rest = (*[None] * 3, *groups, "int4", 1, "int4", 1, "silu", None)
    torch.library.opcheck(quantized_moe_forward, (x, weights, *tensors, *rest))
    bias = make(3, 64)
    torch.library.opcheck(quantized_grouped_forward, (x, up.words, up.scales, up.zeros, bias, *groups, "int4", 1, True))

    def function(x: Tensor, weights: Tensor) -> Tensor:
        y = quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
        return y + quantized_grouped_linear(x, up, group_by_expert(ids, 3), bias_EF=bias)[: len(y)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weights), function(x, weights))
