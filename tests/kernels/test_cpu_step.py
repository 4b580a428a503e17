"""Compiled decoding steps: wide layers with codes, many rows, split keys, other threads, the output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import compiled, team
from trine.kernels.cpu.codes import LanesWeight, to_lanes
from trine.kernels.cpu.layer import Cache, DecodeLayer, LayerNorms
from trine.kernels.cpu.projection import AnyProjection, LanesProjection, Projection, int4_projection
from trine.kernels.cpu.step import DecodeStep, StepInputs, decode_layers
from trine.kernels.paged_attention.reference import paged_attention_reference
from trine.kernels.rms_norm import rms_norm
from trine.kernels.rope.op import rope_reference

pytestmark = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")
C, H, K, D, FEED, BLOCK = 160, 4, 2, 40, 224, 8
# Rows up to which the layer of a test is computed in loops, whatever this CPU's class.
LOOP_ROWS = 8


def quantize(weight: Tensor, kind: str) -> AnyProjection:
    if kind.startswith("lanes"):
        return LanesProjection(lanes_weight(weight, kind), dots=kind.startswith("lanes dots"))
    if kind == "int4":
        groups = F.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
        scales = groups.abs().amax(dim=2) / 7
        codes = (groups / scales[:, :, None].clamp(min=1e-9)).round().clamp(-8, 7).to(torch.int8).flatten(1)
        return int4_projection(codes, scales)
    if kind == "float8":
        scales = weight.abs().amax(dim=1) / 448
        return Projection((weight / scales[:, None]).to(torch.float8_e4m3fn), scales)
    if kind == "float8 in blocks":  # those of 64 outputs, as of weights that were joined
        scales = weight.abs().amax() / 448 * (1 + torch.rand(-(-len(weight) // 64), -(-weight.shape[1] // 128)))
        lines = scales.repeat_interleave(64, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        return Projection((weight / lines).to(torch.float8_e4m3fn), scales, spread=64)
    if kind.startswith("int8"):
        scales = weight.abs().amax(dim=1) / 127
        codes = (weight / scales[:, None]).round().to(torch.int8)
        return Projection(codes, scales, round_inputs=kind == "int8", per_row=kind == "int8 by rows")
    return Projection(weight.to(getattr(torch, kind)))


def lanes_weight(weight: Tensor, kind: str) -> LanesWeight:
    """Codes of "lanes dots|floats BITS GROUP SCALES", where "zeros" follows with zero points; GROUP 0: all of a row."""
    _, _, bits, size, scales_dtype, *zeros = kind.split()
    limit = 2 ** (int(bits) - 1) - 1
    groups = weight.unflatten(1, (-1, int(size) or weight.shape[1]))
    scales = (groups.abs().amax(dim=2) / limit).to(getattr(torch, scales_dtype))
    offsets = torch.zeros(scales.shape, dtype=torch.int8)
    if zeros:
        offsets = torch.arange(scales.numel()).view(scales.shape).remainder(5).sub(2).to(torch.int8)
    codes = (groups / scales.float()[:, :, None]).round() + offsets[:, :, None]
    codes_NK = codes.clamp(-limit - 1, limit).to(torch.int8).flatten(1)
    return to_lanes(codes_NK, scales, offsets if zeros else None, int(bits))


def make_layer(kind: str, seed: int, blocks: int, width: int = C, feed: int = FEED, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pools = random(2, blocks, BLOCK, K, D)
    shapes = {
        "qkv": ((H + 2 * K) * D, width),
        "out": (width, H * D),
        "gate_up": (2 * feed, width),
        "down": (width, feed),
    }
    return {
        "norms": LayerNorms(random(width) * 0.1 + 1, random(width) * 0.1 + 1),
        **{name: quantize(random(n, k) / k**0.5, kind) for name, (n, k) in shapes.items()},
        "cache": Cache(pools[0], pools[1]),
        "num_heads": H,
        **options,
    }


def make_inputs(lengths: list[int], seed: int = 0) -> tuple[dict[str, Any], int]:
    """Tensors of a step for requests of these lengths, in blocks that lie in any order; the number of blocks."""
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, part in enumerate(order.split(counts)):
        table[row, : len(part)] = part
    positions = torch.tensor(lengths) - 1
    blocks = table.gather(1, (positions // BLOCK)[:, None]).flatten().long()
    angles = positions[:, None] * 0.7 ** torch.arange(D // 2)
    tensors = {
        "block_table_MB": table,
        "lengths_M": torch.tensor(lengths, dtype=torch.int32),
        "slots_M": blocks * BLOCK + positions % BLOCK,
        "cos_MR": angles.cos(),
        "sin_MR": angles.sin(),
    }
    return tensors, sum(counts)


def by_64(x: Tensor) -> Tensor:
    """Numbers rounded as inputs of codes are: to 8 bits with a scale for every 64 of a row."""
    parts = []
    for part in x.split(64, dim=-1):
        scale = part.abs().amax(dim=-1, keepdim=True) / 127
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, dim=-1)


def by_rows(x: Tensor) -> Tensor:
    """Numbers rounded to 8 bits with a scale for each row."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / scale).round() * scale


def by_float8(x: Tensor) -> Tensor:
    """Numbers rounded to float8 with a scale for each row."""
    scale = x.abs().amax(dim=-1, keepdim=True).float() / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).double()


def by_float8_of_128(x: Tensor) -> Tensor:
    """Numbers rounded to float8 with a scale for every 128 of a row."""
    return torch.cat([by_float8(part) for part in x.split(128, dim=-1)], dim=-1)


def as_given(x: Tensor) -> Tensor:
    return x


ROUNDING = {
    "int8": by_64,
    "int4": by_64,
    "int8 by rows": by_rows,
    "float8": by_float8,
    "float8 in blocks": by_float8_of_128,
}


def by_float64(
    x: Tensor,
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    rounded: Callable[[Tensor], Tensor] = as_given,
) -> Tensor:
    """The layer with its dequantized weights, inputs rounded so; the pools are left alone."""

    def apply(name: str, inputs: Tensor) -> Tensor:
        return F.linear(rounded(inputs), arguments[name].dense().double())

    x, k, v = x.double(), arguments["cache"].k.double(), arguments["cache"].v.double()
    h = rms_norm(x, arguments["norms"].attention_C.double(), 1e-6)
    heads = apply("qkv", h).unflatten(1, (-1, D))
    q, new_k, new_v = heads.split([H, K, K], dim=1)
    cos, sin = (tensors[name].double()[None] for name in ("cos_MR", "sin_MR"))
    q, new_k = (rope_reference(part[None], cos, sin)[0] for part in (q, new_k))
    k.flatten(0, 1)[tensors["slots_M"]], v.flatten(0, 1)[tensors["slots_M"]] = new_k, new_v
    starts = torch.arange(len(x) + 1, dtype=torch.int32)
    o = paged_attention_reference(
        q, k, v, block_table_RM=tensors["block_table_MB"], lengths_R=tensors["lengths_M"], query_starts=starts
    )
    x = x + apply("out", o.flatten(1))
    h = rms_norm(x, arguments["norms"].mlp_C.double(), 1e-6)
    gate, up = apply("gate_up", h).chunk(2, dim=1)
    return x + apply("down", F.silu(gate) * up)


def relative_rms(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


# What a step may be off: fp32's rounding, or that of bf16 products of more rows. With inputs of codes one row may be
# off by more: where an input lies between two codes, the last bit decides which one it becomes (in float64 as well).
@pytest.mark.parametrize(
    ("kind", "rows", "allowed"),
    [
        ("float32", 1, 1e-6),
        ("bfloat16", 3, 1e-6),
        ("bfloat16", 7, 1e-6),
        ("int8 by floats", 2, 1e-6),
        ("int8", 2, 1e-5),
        ("int8", 8, 1e-5),
        ("int4", 2, 1e-5),
        ("int4", 5, 1e-5),
        ("int8 by rows", 3, 1e-5),
        ("float8", 2, 1e-5),
        ("float8", 6, 1e-5),
        ("float8 in blocks", 1, 1e-5),
        ("float8 in blocks", 7, 1e-5),
        ("int8 by rows", 7, 1e-5),
        ("lanes dots 4 32 bfloat16", 1, 1e-6),
        ("lanes floats 4 32 float16 zeros", 3, 1e-6),
        ("lanes floats 8 0 bfloat16", 2, 1e-6),
        ("lanes dots 4 32 float16 zeros", 5, 1e-6),
        ("lanes dots 4 0 float32", 2, 1e-6),
        ("lanes dots 8 0 bfloat16", 1, 1e-6),
        ("lanes dots 8 32 float32 zeros", 8, 1e-6),
        ("float32", 9, 1e-6),
        ("bfloat16", 17, 8e-3),
        ("int8", 64, 8e-3),
        ("int4", 33, 8e-3),
        ("lanes dots 4 32 bfloat16", 12, 8e-3),
    ],
)
def test_a_layer_equals_float64_at_any_number_of_rows(kind: str, rows: int, allowed: float) -> None:
    tensors, blocks = make_inputs([1 + 7 * row % 30 for row in range(rows)])
    arguments = make_layer(kind, 0, blocks)
    x = torch.randn(rows, C, generator=torch.Generator().manual_seed(1))
    exact = by_float64(x, arguments, tensors, ROUNDING.get(kind, as_given) if rows <= LOOP_ROWS else as_given)
    step = DecodeStep([DecodeLayer(**arguments)])
    step.loop_rows = LOOP_ROWS
    found = step.run(x.clone(), StepInputs(**tensors))
    errors = sorted(map(relative_rms, found, exact))
    assert errors[-2 if allowed == 1e-5 and rows > 1 else -1] < allowed
    assert errors[-1] < 2e-2
    assert relative_rms(x, exact) > 0.1  # the layer does something


def test_keys_of_a_long_request_are_split_and_added_up() -> None:
    tensors, blocks = make_inputs([1200, 3, 600])
    arguments = make_layer("float32", 0, blocks)
    x = torch.randn(3, C, generator=torch.Generator().manual_seed(1))
    exact = by_float64(x, arguments, tensors)
    found = decode_layers(x.clone(), [DecodeLayer(**arguments)], StepInputs(**tensors))
    assert relative_rms(found, exact) < 1e-6


def test_keys_that_distance_rules_out_are_those_outside_a_window() -> None:
    """What is added to scores by distance: nothing up to 9 and very little beyond, in one split and in several."""
    tensors, blocks = make_inputs([1200, 3, 600, 11])
    x = torch.randn(4, C, generator=torch.Generator().manual_seed(1))
    relative = torch.zeros(H, 11)
    relative[:, 10] = -1e9
    found, expected = (
        decode_layers(x.clone(), [DecodeLayer(**make_layer("float32", 0, blocks), **options)], StepInputs(**tensors))
        for options in ({"relative_HW": relative}, {"window": 9})
    )
    assert relative_rms(found, expected) < 1e-6
    plain = decode_layers(x.clone(), [DecodeLayer(**make_layer("float32", 0, blocks))], StepInputs(**tensors))
    assert relative_rms(plain[3], expected[3]) > 1e-3


@pytest.mark.parametrize("rows", [1, 12])
def test_a_step_ends_with_logits(rows: int) -> None:
    tensors, blocks = make_inputs([9] * rows)
    arguments = make_layer("float32", 0, blocks)
    norm, weight = torch.rand(C) + 0.5, torch.randn(77, C)
    step = DecodeStep([DecodeLayer(**arguments)], norm, Projection(weight))
    x = torch.randn(rows, C, generator=torch.Generator().manual_seed(1))
    exact = F.linear(rms_norm(by_float64(x, arguments, tensors), norm.double(), 1e-6), weight.double())
    for _ in range(2):  # the second step finds buffers and the same slots
        assert relative_rms(step.run(x.clone(), StepInputs(**tensors)), exact) < 1e-6


def test_numba_runs_a_step_to_the_same_bits_where_openmp_cannot_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, blocks = make_inputs([700, 4])
    x = torch.randn(2, C, generator=torch.Generator().manual_seed(1))
    results = []
    for found in (team.team(), None):
        monkeypatch.setattr(team, "team", lambda found=found: found)
        layer = DecodeLayer(**make_layer("int8", 0, blocks))
        results.append(decode_layers(x.clone(), [layer], StepInputs(**tensors)))
    assert torch.equal(results[0], results[1])


def test_rows_do_not_depend_on_others_in_the_loops() -> None:
    tensors, blocks = make_inputs([5, 30])
    x = torch.randn(2, C, generator=torch.Generator().manual_seed(1))
    together = decode_layers(x.clone(), [DecodeLayer(**make_layer("int4", 0, blocks))], StepInputs(**tensors))
    alone = {name: tensor[:1].contiguous() for name, tensor in tensors.items()}
    first = decode_layers(x[:1].clone(), [DecodeLayer(**make_layer("int4", 0, blocks))], StepInputs(**alone))
    assert torch.equal(together[:1], first)


@pytest.mark.parametrize("columns", [64, 100, 128, 200])
def test_int4_codes_come_back_from_their_layout(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(5, 1, generator=generator).half().float() + 0.5
    assert torch.equal(int4_projection(codes, scales).dense(), codes * scales.half().float())


def test_the_constants_of_python_are_those_of_the_loops() -> None:
    from trine.kernels.cpu import (
        attention_loops,
        codes_loops,
        float8_loops,
        layer,
        product_loops,
        projection,
        step,
        step_attention_loops,
        vector_loops,
    )

    over = ("EACH_HEAD", "ALL_HEADS", "LAYER_NORM_HEADS")
    assert [getattr(layer, name) for name in over] == [getattr(step_attention_loops, name) for name in over]
    assert projection.BLOCKED == float8_loops.GROUP
    assert step.SPLIT == attention_loops.SPLIT
    assert projection.SHORTEST == vector_loops.CODE_BLOCK == projection.CODES_OF_HALF
    kinds = ("FLOAT32", "BFLOAT16", "INT8", "FLOAT8", "TILES", "DOTS", "INT8_CODES", "INT8_TOKENS", "INT4_CODES")
    assert [getattr(projection, kind) for kind in kinds] == [getattr(product_loops, kind) for kind in kinds]
    scales = [projection._SCALE_KINDS[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert scales == [codes_loops.FLOAT32, codes_loops.BFLOAT16, codes_loops.FLOAT16]


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.zeros(2, 64), torch.ones(2, 2), r"codes are torch.float32 \(2, 64\)"),
        (torch.zeros(2, 64, dtype=torch.int8), torch.ones(3, 2), r"scales \(3, 2\); expected"),
        (torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 4), "a scale stands for 16 inputs; supported are 32"),
        (torch.full((2, 64), 8, dtype=torch.int8), torch.ones(2, 2), "codes lie in 8 to 8; 4 bits hold -8 to 7"),
        (torch.zeros(2, 64, dtype=torch.int8), torch.full((2, 2), 1e6), r"scales reach 1e\+06; fp16 holds"),
    ],
)
def test_int4_codes_that_do_not_fit_are_refused(codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int4_projection(codes, scales)


def test_steps_that_do_not_fit_together_are_refused() -> None:
    layer = DecodeLayer(**make_layer("float32", 0, 1))
    with pytest.raises(ValueError, match="a step has no layers"):
        DecodeStep([])
    with pytest.raises(ValueError, match="layer 1 has width 64, layer 0 160"):
        DecodeStep([layer, DecodeLayer(**make_layer("float32", 0, 1, width=64))])
    with pytest.raises(ValueError, match="the final norm and the output projection go together"):
        DecodeStep([layer], torch.ones(C))
    with pytest.raises(ValueError, match="output takes 7 inputs; its layer gives 160"):
        DecodeStep([layer], torch.ones(C), Projection(torch.ones(9, 7)))
