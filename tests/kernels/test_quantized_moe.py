"""Mixture of experts with quantized weights on the CPU, and the launch configurations of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.moe.groups import group_by_expert
from trine.kernels.moe.matmul import grouped_matmul_reference
from trine.kernels.moe.op import moe_mlp_reference
from trine.kernels.quantized.packing import PackedWeight, pack
from trine.kernels.quantized.weight_only import shared_estimate
from trine.kernels.quantized_moe import rows as rows_of_experts
from trine.kernels.quantized_moe.configs import GROUPED
from trine.kernels.quantized_moe.experts import PackedExperts, float8_experts, join_experts, mxfp4_experts, pack_experts
from trine.kernels.quantized_moe.op import quantized_grouped_linear, quantized_moe_mlp
from trine.kernels.quantized_moe.reference import float8_reference, mxfp4_reference, packed_reference
from trine.kernels.quantized_moe.rows import FloatRows
from trine.kernels.target import COMPILED, INTERPRETER

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = pytest.mark.parametrize(
    "form", ["int4 32", "int4 row zeros", "int8 64 zeros", "int8 row", "fp8 expert", "fp8 row", "fp8 blocks", "mxfp4"]
)
FLOAT8 = torch.float8_e4m3fn
# Error allowed, in units of the largest exact number: a few roundings of terms and result.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


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
        shape = {"row": (e, n), "expert": (e,), "blocks": (e, -(-n // 128), -(-k // 128))}[rest[0]]
        scales = (torch.rand(shape, generator=generator) + 0.5) / k**0.5
        codes = make(e, n, k, seed=seed).to(FLOAT8)
        return float8_experts(codes, scales), float8_reference(codes, scales)
    bits, groups = int(kind[3:]), 1 if rest[0] == "row" else k // int(rest[0])
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (e, n, k), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-half, half, (e, n, groups), generator=generator, dtype=torch.int8) if rest[1:] else None
    scales = ((torch.rand(e, n, groups, generator=generator) + 0.5) / (half * k**0.5)).bfloat16()
    return pack_experts(values, scales, zeros, bits=bits), packed_reference(values, scales, zeros)


def layer(form: str, e: int, c: int, f: int) -> tuple[tuple[PackedExperts, PackedExperts, PackedExperts], list[Tensor]]:
    made = [experts(form, e, *shape, seed=place) for place, shape in enumerate(((f, c), (f, c), (c, f)))]
    (gate, _), (up, _), (down, _) = made
    return (gate, up, down), [exact for _, exact in made]


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert float((found.double() - exact).abs().max()) <= BOUNDS[dtype] * float(exact.abs().max())


# --- weights ----------------------------------------------------------------------------------------------------------


@FORMS
def test_experts_hold_what_they_got(form: str) -> None:
    weight, exact = experts(form, 3, 150, 192)
    assert (weight.kind, weight.num_experts, weight.num_features, weight.width) == (form.split()[0], 3, 150, 192)
    assert weight.words is None
    assert weight.device.type == "cpu"
    assert weight.num_bytes >= 3 * 150 * 192 * (4 if "4" in weight.kind else 8) // 8
    for of_expert, expected in zip(weight.rows, exact, strict=True):
        if isinstance(of_expert, FloatRows):
            found = of_expert.dequantize(torch.float32, slice(0, 256))
            assert torch.equal(found, expected.float())
            assert torch.equal(of_expert.dequantize(torch.float16, slice(128, 150)), expected[128:].float().half())
        else:
            assert isinstance(of_expert, PackedWeight)


@FORMS
def test_what_was_given_comes_back(form: str) -> None:
    weight, exact = experts(form, 3, 150, 192)
    assert weight.to("cpu") is weight
    codes, scales, zeros = weight.plain(2)
    if weight.kind.startswith("int"):
        points = None if zeros is None else zeros[None]
        found = packed_reference(codes[None], scales[None], points)
        again = join_experts((pack(*weight.plain(e), bits=int(weight.kind[3:])) for e in range(3)), 3)
        assert again.scheme == weight.scheme
    elif weight.kind == "fp8":
        found = float8_reference(codes.view(FLOAT8)[None], scales[None])
    else:
        found = mxfp4_reference(codes.view(torch.uint8).view(1, 150, 6, 16), scales[None])
    assert torch.equal(found[0], exact[2])


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_torch_and_compiled_loops_decode_to_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any codes but NaN, in rows that end within a vector, and pieces that begin within a block."""
    generator = torch.Generator().manual_seed(0)
    width = {"fp8": 269, "mxfp4": 96}[kind]
    codes = torch.randint(0, 256, (150, width if kind == "fp8" else width // 2), generator=generator).to(torch.uint8)
    codes[(codes & 127) == 127] = 0
    scales = torch.rand(2, 3, generator=generator) if kind == "fp8" else torch.randint(0, 255, (150, 3)).to(torch.uint8)
    rows = FloatRows(codes.view(torch.int8), scales, kind, 128 if kind == "fp8" else 1)
    pieces = [slice(0, 150), slice(100, 149), slice(149, 160)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    compiled = [rows.dequantize(dtype, piece) for dtype in dtypes for piece in pieces]
    monkeypatch.setattr(rows_of_experts, "available", lambda: False)
    for found, expected in zip(
        compiled, (rows.dequantize(dtype, piece) for dtype in dtypes for piece in pieces), strict=True
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@DTYPES
def test_every_float_code_is_exact(dtype: torch.dtype) -> None:
    codes = torch.arange(256).where(torch.arange(256) % 128 != 127, 0).to(torch.uint8).view(FLOAT8).view(1, 1, 256)
    (rows,) = float8_experts(codes, torch.ones(1, 1)).rows
    assert isinstance(rows, FloatRows)
    assert torch.equal(rows.dequantize(dtype, slice(None)).double(), codes[0].double())
    blocks = torch.arange(256).view(1, 1, 16, 16).to(torch.uint8)
    scales = torch.tensor([0, 1, 251, 127, *range(115, 127)]).to(torch.uint8).view(1, 1, 16)
    (rows,) = mxfp4_experts(blocks, scales).rows
    assert isinstance(rows, FloatRows)
    assert torch.equal(rows.dequantize(dtype, slice(None)), mxfp4_reference(blocks, scales)[0].float().to(dtype))


def test_mxfp4_is_what_gpt_oss_means() -> None:
    """The checkpoint's layout, read by hand: low half first, 2^(scale - 127), gate and up interleaved."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :3] = torch.tensor([0x21, 0xF7, 0x98])
    blocks[0, 1, 0, 0] = 0x60
    scales = torch.tensor([[[128], [125]]], dtype=torch.uint8)
    gate = mxfp4_experts(blocks[:, ::2], scales[:, ::2])
    up = mxfp4_experts(blocks[:, 1::2], scales[:, 1::2])
    x, groups = torch.eye(32), group_by_expert(torch.zeros(32, 1, dtype=torch.long), 1)
    found = quantized_grouped_linear(x, gate, groups).flatten().tolist()
    assert found == [1.0, 2.0, 12.0, -12.0, 0.0, -1.0, *[0.0] * 26]
    assert quantized_grouped_linear(x, up, groups).flatten().tolist() == [0.0, 1.0, *[0.0] * 30]


# --- products ---------------------------------------------------------------------------------------------------------


def test_experts_that_differ_are_not_joined() -> None:
    one, other = (pack(torch.zeros(4, k, dtype=torch.int8), torch.ones(4, 1), bits=8) for k in (32, 64))
    assert join_experts([one, one], 2).num_experts == 2
    for weights, count, words in (
        ([one, other], 2, r"expert 1 of 2 is 8-bit \[4, 64\]"),
        ([one], 2, "there are 1 experts; expected 2"),
        ([], 0, "there are 0 experts"),
        ([one, one], 1, "expert 1 of 1"),
    ):
        with pytest.raises(ValueError, match=words):
            join_experts(weights, count)


@FORMS
@DTYPES
@pytest.mark.parametrize("gather", [True, False])
def test_grouped_linear(gather: bool, dtype: torch.dtype, form: str) -> None:
    weight, exact = experts(form, 4, 144, 192)
    ids = torch.tensor([[0, 3], [3, 1], [4, 0], [1, 3], [0, 4]])  # nothing of expert 2; 4 is none
    groups = group_by_expert(ids, 4)
    x, bias = make(5 if gather else 10, 192, dtype=dtype), make(4, 144, seed=1)
    found = quantized_grouped_linear(x, weight, groups, bias_EF=bias, gather=gather)
    expected = grouped_matmul_reference(x.double(), exact, groups, bias_EF=bias.double(), gather=gather)
    close(found, expected, dtype)
    assert not found[8:].any()


@FORMS
@DTYPES
def test_layer(form: str, dtype: torch.dtype) -> None:
    packed, exact = layer(form, 4, 128, 64)
    x, weights = make(2, 4, 128, dtype=dtype), make(2, 4, 2, seed=3).sigmoid()
    ids = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(4)).topk(2, dim=-1).indices
    found = quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    close(found, moe_mlp_reference(x.double(), ids, weights.double(), *exact, activation="silu"), dtype)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_activations_and_biases(activation: str) -> None:
    packed, exact = layer("mxfp4", 3, 64, 96)
    x, weights, ids = make(7, 64), make(7, 2, seed=3).sigmoid(), torch.tensor([[0, 1], [2, 1], [0, 2]] * 2 + [[1, 0]])
    biases: dict[str, Any] = {"gate_bias": make(3, 96, seed=5), "up_bias": make(3, 96, seed=6)}
    biases["down_bias"] = make(3, 64, seed=7)
    limit = 0.9 if activation == "swiglu_clamped" else None
    found = quantized_moe_mlp(x, ids, weights, *packed, activation=activation, limit=limit, **biases)
    doubled = {name: bias.double() for name, bias in biases.items()}
    expected = moe_mlp_reference(
        x.double(), ids, weights.double(), *exact, activation=activation, limit=limit, **doubled
    )
    close(found, expected, torch.float32)


def test_nobody_and_nothing() -> None:
    packed, _ = layer("int4 32", 3, 64, 32)
    x, ids, weights = make(4, 64), torch.full((4, 2), 3), torch.ones(4, 2)
    assert not quantized_moe_mlp(x, ids, weights, *packed, activation="silu").any()
    assert quantized_moe_mlp(x[:0], ids[:0], weights[:0], *packed, activation="silu").shape == (0, 64)
    down, exact = experts("int8 row", 3, 64, 32)
    mixed = quantized_moe_mlp(x, ids - 1, weights, packed[0], packed[1], down, activation="silu")
    assert mixed.isfinite().all()  # down may be of another kind
    assert len(exact) == 3


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_weights_that_fit_nothing_are_refused() -> None:
    values, scales = torch.zeros(2, 3, 64, dtype=torch.int8), torch.ones(2, 3, 2)
    for arguments, match in (
        ((values[0], scales[0], None), "values have shape"),
        ((values, scales[:1], None), "values have shape"),
        ((values, scales, torch.zeros(2, 3, 1, dtype=torch.int8)), "zeros have shape"),
        ((values.float(), scales, None), "values are torch.float32"),
        ((values + 8, scales, None), "values of 4 bits must be in"),
    ):
        with pytest.raises(ValueError, match=match):
            pack_experts(*arguments, bits=4)
    codes = torch.zeros(2, 3, 64).to(FLOAT8)
    with pytest.raises(ValueError, match=r"codes are torch\.int8"):
        float8_experts(values, torch.ones(2))
    with pytest.raises(ValueError, match=r"scales are torch\.float32 \(3,\)"):
        float8_experts(codes, torch.ones(3))
    with pytest.raises(ValueError, match="codes hold NaN"):
        float8_experts(torch.full((1, 1, 4), float("nan")).to(FLOAT8), torch.ones(1))
    blocks, bytes_ENG = torch.zeros(2, 3, 2, 16, dtype=torch.uint8), torch.zeros(2, 3, 2, dtype=torch.uint8)
    for given, match in (
        ((blocks[..., :8], bytes_ENG), "blocks are torch.uint8 \\(2, 3, 2, 8\\)"),
        ((blocks, bytes_ENG.float()), "scales are torch.float32"),
        ((blocks, bytes_ENG[..., :1]), "scales are torch.uint8 \\(2, 3, 1\\)"),
        ((blocks, bytes_ENG + 255), "255"),
    ):
        with pytest.raises(ValueError, match=match):
            mxfp4_experts(*given)


def test_arguments_that_fit_nothing_are_refused() -> None:
    (gate, up, down), _ = layer("int4 32", 3, 64, 32)
    other, _ = experts("mxfp4", 3, 32, 64)
    rows, _ = experts("int4 row", 3, 32, 64)
    fitting: dict[str, Any] = {
        "x_NC": make(4, 64),
        "expert_ids_NK": torch.zeros(4, 2, dtype=torch.long),
        "weights_NK": torch.ones(4, 2),
        "gate": gate,
        "up": up,
        "down": down,
        "activation": "silu",
    }
    quantized_moe_mlp(**fitting)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x_NC": make(4, 32)}, "x has shape"),
        ({"x_NC": make(4, 64).double()}, "x is torch.float64"),
        ({"x_NC": make(4, 64).requires_grad_()}, "a gradient is wanted"),
        ({"weights_NK": torch.ones(4, 1)}, "weights has shape"),
        ({"weights_NK": torch.ones(4, 2).double()}, "weights is torch.float64"),
        ({"expert_ids_NK": torch.zeros(3, 2, dtype=torch.long)}, "expert_ids has shape"),
        ({"expert_ids_NK": torch.full((4, 2), 4)}, "expert_ids are 4 to 4"),
        ({"gate": other}, "gate is mxfp4"),
        ({"gate": rows}, "both must have one scheme"),
        ({"down": up}, "down is int4"),
        ({"activation": "none"}, "activation is 'none'"),
        ({"activation": "swiglu_clamped"}, "limit is None"),
        ({"limit": 7.0}, "limit is 7.0"),
        ({"gate_bias": make(3, 32)}, "one of gate_bias and up_bias"),
        ({"down_bias": make(3, 32)}, "down_bias is torch.float32"),
    ]
    for changed, match in cases:
        with pytest.raises(ValueError, match=match):
            quantized_moe_mlp(**{**fitting, **changed})
    with torch.no_grad():
        quantized_moe_mlp(**{**fitting, "x_NC": make(4, 64).requires_grad_()})
    groups = group_by_expert(torch.zeros(4, 2, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="x has shape"):
        quantized_grouped_linear(make(4, 64), up, groups, gather=False)
    with pytest.raises(ValueError, match="weight has 3 experts"):
        quantized_grouped_linear(make(4, 64), up, group_by_expert(torch.zeros(4, 2, dtype=torch.long), 2))
    with pytest.raises(ValueError, match=r"bias is torch\.float32"):
        quantized_grouped_linear(make(4, 64), up, groups, bias_EF=make(3, 64))


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("bits", [4, 8])
@DTYPES
def test_configurations_fit(dtype: torch.dtype, bits: int, target: Any) -> None:
    for pairs in (1, 8, 128, 2048, 32768):
        for products in (1, 2):
            shape = {"P": pairs, "E": 128, "N": 768, "K": 2048, "exact_bits": bits, "exact_group": 32}
            choices = GROUPED.choices({**shape, "exact_products": products}, dtype, target)
            assert len(choices) > 1
            for config in choices:
                assert target.interpreted or shared_estimate(config, bits, dtype, target) <= target.shared_bytes
                sizes = config.blocks
                assert all(size & (size - 1) == 0 for size in sizes.values())
                assert 128 % sizes["FEATURES"] == 0  # a tile lies within one block of scales


def test_few_pairs_are_split_and_many_get_tall_tiles() -> None:
    def pick(pairs: int, arch: str = "sm_90", group: int = 128) -> dict[str, int]:
        sizes = {"E": 128, "N": 768, "K": 2048, "exact_bits": 4, "exact_group": group, "exact_products": 2}
        return dict(GROUPED.pick(torch.bfloat16, COMPILED[arch], P=pairs, **sizes).blocks)

    assert pick(8)["SPLITS"] > 1
    assert pick(8)["ROWS"] == 16
    assert pick(2048)["SPLITS"] == 1
    assert pick(128 * 40)["ROWS"] == 64
    assert pick(128 * 200) == {"FEATURES": 128, "ROWS": 128, "TILES": 8, "SPLITS": 1}
    assert pick(128 * 200, group=32)["FEATURES"] == 64
    assert pick(128 * 200, "sm_80", 32)["ROWS"] == 64
