"""Mixture of experts with quantized weights on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.moe.groups import group_by_expert
from trine.kernels.moe.matmul import grouped_matmul_reference
from trine.kernels.moe.op import moe_mlp_reference
from trine.kernels.quantized_moe.experts import PackedExperts, float8_experts, mxfp4_experts, pack_experts
from trine.kernels.quantized_moe.op import quantized_grouped_linear, quantized_moe_mlp
from trine.kernels.quantized_moe.reference import float8_reference, mxfp4_reference, packed_reference

# Error over the root mean square of the exact values: (largest, mean).
BOUNDS = {torch.float32: (3e-4, 1e-5), torch.bfloat16: (1.2e-1, 1e-2), torch.float16: (2e-2, 2e-3)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
INTEGERS = (
    "int4 32,int4 32 zeros,int4 64,int4 64 zeros,int4 128,int4 128 zeros,int4 row,int8 64,int8 128 zeros,int8 row"
)
FORMS = pytest.mark.parametrize("form", [*INTEGERS.split(","), "fp8 expert", "fp8 row", "fp8 blocks", "mxfp4"])
FLOAT8 = torch.float8_e4m3fn
Shape = tuple[int, int, int, int]
# Slots, experts, width, feed-forward width.
GPT_OSS: Shape = (4, 32, 2880, 2880)
QWEN3: Shape = (8, 128, 2048, 768)
SMALL: Shape = (2, 8, 512, 384)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def experts(form: str, e: int, n: int, k: int, seed: int = 0) -> tuple[PackedExperts, Tensor]:
    """Packed weights of about 1 / sqrt(k) and their exact numbers, in float64."""
    generator = torch.Generator("cuda").manual_seed(seed)
    kind, *rest = form.split()

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype, device="cuda")

    if kind == "mxfp4":
        blocks = integers(0, 256, e, n, k // 32, 16, dtype=torch.uint8)
        mx_scales = integers(118, 122, e, n, k // 32, dtype=torch.uint8)
        return mxfp4_experts(blocks, mx_scales), mxfp4_reference(blocks, mx_scales)
    if kind == "fp8":
        shape = {"row": (e, n), "expert": (e,), "blocks": (e, -(-n // 128), -(-k // 128))}[rest[0]]
        scales = (torch.rand(shape, generator=generator, device="cuda") + 0.5) / k**0.5
        codes = draw(e, n, k, seed=seed).to(FLOAT8)
        return float8_experts(codes, scales), float8_reference(codes, scales)
    bits, groups = int(kind[3:]), 1 if rest[0] == "row" else k // int(rest[0])
    half = 1 << (bits - 1)
    values = integers(-half, half, e, n, k, dtype=torch.int8)
    zeros = integers(-half, half, e, n, groups, dtype=torch.int8) if rest[1:] else None
    scales = ((torch.rand(e, n, groups, generator=generator, device="cuda") + 0.5) / (half * k**0.5)).bfloat16()
    return pack_experts(values, scales, zeros, bits=bits), packed_reference(values, scales, zeros)


def layer(form: str, shape: Shape) -> tuple[tuple[PackedExperts, PackedExperts, PackedExperts], list[Tensor]]:
    _, e, c, f = shape
    made = [experts(form, e, *sizes, seed=place) for place, sizes in enumerate(((f, c), (f, c), (c, f)))]
    (gate, _), (up, _), (down, _) = made
    return (gate, up, down), [exact for _, exact in made]


def choose(num_tokens: int, shape: Shape, *, none: bool = False) -> Tensor:
    """Different experts for each token, expert 1 seldom; with `none` also slots of no expert."""
    slots, e, *_ = shape
    scores = torch.rand(num_tokens, e + none, device="cuda", generator=torch.Generator("cuda").manual_seed(9))
    scores[:, 1] *= 0.4
    return scores.topk(slots, dim=-1).indices


def check(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    largest, mean = BOUNDS[dtype]
    assert found.dtype == dtype
    assert found.shape == exact.shape
    size = float(exact.square().sum().div(exact.count_nonzero().clamp(min=1)).sqrt())
    error = (found.double() - exact).abs()
    assert float(error.max()) <= largest * size, f"largest error {float(error.max()) / size:.2e}"
    assert float(error.mean()) <= mean * size, f"mean error {float(error.mean()) / size:.2e}"


def compare(
    form: str, shape: Shape, tokens: list[int], dtype: torch.dtype, activation: str, *, bias: bool, none: bool = False
) -> None:
    packed, exact = layer(form, shape)
    slots, e, c, f = shape
    limit = 1.0 if activation == "swiglu_clamped" else None
    biases: dict[str, Any] = {}
    if bias:
        biases = {name: draw(e, f, seed=place) for place, name in enumerate(("gate_bias", "up_bias"), 5)}
        biases["down_bias"] = draw(e, c, seed=7)
    doubled = {name: tensor.double() for name, tensor in biases.items()}
    for n in tokens:
        x, weights, ids = draw(n, c).to(dtype), draw(n, slots, seed=1).sigmoid(), choose(n, shape, none=none)
        found = quantized_moe_mlp(x, ids, weights, *packed, activation=activation, limit=limit, **biases)
        expected = moe_mlp_reference(
            x.double(), ids, weights.double(), *exact, activation=activation, limit=limit, **doubled
        )
        check(found, expected, dtype)


@DTYPES
def test_every_float_code_is_exact(dtype: torch.dtype) -> None:
    """Products with unit vectors give the weights themselves, those of subnormal codes too."""
    groups = group_by_expert(torch.zeros(256, 1, dtype=torch.long, device="cuda"), 1)
    counted = torch.arange(256, device="cuda")
    codes = counted.where(counted % 128 != 127, 0).to(torch.uint8).view(FLOAT8).view(1, 1, 256)
    x = torch.eye(256, device="cuda", dtype=dtype)
    found = quantized_grouped_linear(x, float8_experts(codes, torch.ones(1, device="cuda")), groups)
    assert torch.equal(found[:, 0].double(), codes.flatten().double())
    bytes_EN = counted.view(1, 1, 16, 16).to(torch.uint8)
    tail = [115 + i for i in range(13)]
    # Powers of two at the ends of the range, but for fp16, which cannot hold them.
    scales = torch.tensor(([120] * 3 if dtype == torch.float16 else [1, 2, 251]) + tail, dtype=torch.uint8)
    scales = scales.view(1, 1, 16).cuda()
    groups = group_by_expert(torch.zeros(512, 1, dtype=torch.long, device="cuda"), 1)
    x = torch.eye(512, device="cuda", dtype=dtype)
    found = quantized_grouped_linear(x, mxfp4_experts(bytes_EN, scales), groups)
    assert torch.equal(found[:, 0], mxfp4_reference(bytes_EN, scales).flatten().float().to(dtype))


@HALF
@pytest.mark.parametrize("bias", [False, True])
def test_gpt_oss(bias: bool, dtype: torch.dtype) -> None:
    compare("mxfp4", GPT_OSS, [1, 16, 300, 2048], dtype, "swiglu_clamped", bias=bias)


@HALF
@pytest.mark.parametrize("form", ["int4 128", "fp8 blocks"])
def test_qwen3_moe(form: str, dtype: torch.dtype) -> None:
    compare(form, QWEN3, [1, 2, 64, 512, 2048], dtype, "silu", bias=False)


@FORMS
@DTYPES
def test_every_form(form: str, dtype: torch.dtype) -> None:
    """From one token to tiles of 128 rows, with bias, slots of no expert and K split."""
    compare(form, SMALL, [1, 5, 70, 260, 600], dtype, "silu", bias=True, none=True)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_activations(activation: str) -> None:
    compare("int4 128", SMALL, [3, 400], torch.bfloat16, activation, bias=True)


@DTYPES
@pytest.mark.parametrize("form", ["int4 row", "int8 row", "fp8 row", "fp8 blocks"])
@pytest.mark.parametrize(
    ("tokens", "slots", "e", "n", "k"), [(5, 1, 3, 123, 65), (129, 3, 5, 72, 257), (33, 2, 300, 96, 40)], ids=str
)
def test_odd_shapes(tokens: int, slots: int, e: int, n: int, k: int, form: str, dtype: torch.dtype) -> None:
    weight, exact = experts(form, e, n, k)
    groups = group_by_expert(choose(tokens, (slots, e, k, n), none=True), e)
    bias = draw(e, n, seed=2)
    for gather in (True, False):
        x = draw(tokens if gather else tokens * slots, k).to(dtype)
        found = quantized_grouped_linear(x, weight, groups, bias_EF=bias, gather=gather)
        check(found, grouped_matmul_reference(x.double(), exact, groups, bias_EF=bias.double(), gather=gather), dtype)


def test_no_tokens_and_nobody() -> None:
    packed, _ = layer("int4 32", SMALL)
    x, ids, weights = draw(4, 512), torch.full((4, 2), 8, device="cuda"), torch.ones(4, 2, device="cuda")
    assert not quantized_moe_mlp(x, ids, weights, *packed, activation="silu").any()
    assert quantized_moe_mlp(x[:0], ids[:0], weights[:0], *packed, activation="silu").shape == (0, 512)


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_two_runs_give_the_same_bits(tokens: int) -> None:
    packed, _ = layer("mxfp4", GPT_OSS)
    x, weights = draw(tokens, 2880).bfloat16(), draw(tokens, 4, seed=1).sigmoid()
    ids = choose(tokens, GPT_OSS)
    first = quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    for _ in range(5):
        assert torch.equal(quantized_moe_mlp(x, ids, weights, *packed, activation="silu"), first)


def test_nothing_waits_for_the_gpu() -> None:
    packed, _ = layer("int4 128", SMALL)
    x, weights, ids = draw(9, 512).bfloat16(), draw(9, 2, seed=1).sigmoid(), choose(9, SMALL)
    quantized_moe_mlp(x, ids, weights, *packed, activation="silu")  # compiles
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_takes_other_experts() -> None:
    """Captured once, replayed with tokens and experts of another step."""
    packed, _ = layer("fp8 row", SMALL)
    x, weights, ids = draw(9, 512).bfloat16(), draw(9, 2, seed=1).sigmoid(), choose(9, SMALL)
    quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    x.copy_(draw(9, 512, seed=5))
    ids.copy_((ids + 3) % 8)
    graph.replay()
    assert torch.equal(y, quantized_moe_mlp(x, ids, weights, *packed, activation="silu"))


def test_no_dequantized_weight_is_in_memory() -> None:
    packed, _ = layer("mxfp4", GPT_OSS)
    x, weights, ids = draw(64, 2880).bfloat16(), draw(64, 4, seed=1).sigmoid(), choose(64, GPT_OSS)
    quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantized_moe_mlp(x, ids, weights, *packed, activation="silu")
    # h, the rows of the pairs and the result in bf16, and parts of sums in fp32 where K is split.
    rows = 64 * 4 * 2880
    assert torch.cuda.max_memory_allocated() - before <= 2 * rows * 2 + 8 * rows * 4 + 2**22


def needs_memory() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB of GPU memory")


def test_offsets_past_2_to_the_31_in_weights() -> None:
    """More than 2^31 words; the last expert is compared."""
    needs_memory()
    e, n, k = 129, 16400, 4096
    assert e * n * k // 4 > 2**31
    values = torch.zeros(e, n, k, dtype=torch.int8, device="cuda")
    values[-1].random_(-128, 128, generator=torch.Generator("cuda").manual_seed(3))
    scales = torch.full((e, n, 1), 1 / (128 * k**0.5), device="cuda")
    weight = pack_experts(values, scales, bits=8)
    last = packed_reference(values[-1:], scales[-1:])[0]
    x = draw(40, k).bfloat16()
    groups = group_by_expert((e - 1 - torch.arange(40, device="cuda") % 2)[:, None], e)
    found = quantized_grouped_linear(x, weight, groups)
    check(found[-20:], x[groups.pair_P.long()[-20:]].double() @ last.T, torch.bfloat16)
    assert not found[:20].any()


def test_offsets_past_2_to_the_31_in_rows() -> None:
    """Results, then rows in grouped order, of more than 2^31 numbers; the last are compared."""
    needs_memory()
    tokens, wide = 2**17 + 5, 2**14 + 64
    assert tokens * wide > 2**31
    up, up_exact = experts("mxfp4", 2, wide, 32)
    down, down_exact = experts("mxfp4", 2, 32, wide, seed=1)
    groups = group_by_expert(torch.arange(tokens, device="cuda")[:, None] % 2, 2)
    x = draw(tokens, 32).bfloat16()
    h = quantized_grouped_linear(x, up, groups)
    check(h[-300:], x[groups.pair_P.long()[-300:]].double() @ up_exact[1].T, torch.bfloat16)
    y = quantized_grouped_linear(h, down, groups, gather=False)
    check(y[-300:], h[-300:].double() @ down_exact[1].T, torch.bfloat16)
