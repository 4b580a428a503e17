"""Compiled decoder layers on the CPU: several steps against the same layers written in torch and float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import compiled, layer
from trine.kernels.cpu.layer import Cache, DecodeLayer, LayerNorms
from trine.kernels.cpu.projection import Projection
from trine.kernels.cpu.step import DecodeStep, StepInputs, decode_layers
from trine.kernels.kv_write.op import write_kv_reference
from trine.kernels.paged_attention.reference import paged_attention_reference
from trine.kernels.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")
C, H, K, D, FEED = 48, 4, 2, 16, 56
TABLE = torch.tensor([[2, 0, -1], [3, 1, 4]], dtype=torch.int32)
LENGTHS = (18, 30)  # keys before the first step


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def projection(n: int, k: int, dtype: torch.dtype, seed: int, bias: bool) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    bias_N = torch.randn(n, generator=generator) * 0.1 if bias else None
    if dtype != torch.int8:
        return Projection(weight.to(dtype), None, bias_N)
    scales = weight.abs().amax(dim=1) / 127
    return Projection((weight / scales[:, None]).round().to(torch.int8), scales, bias_N)


def norms_of(
    placement: str, kind: str, generator: torch.Generator, *, unit_offset: bool = False, eps: float = 1e-6
) -> LayerNorms:
    """The norms that a layer has at a placement, of "rms", "layer" or "layer without biases"."""
    rows = [torch.rand(C, generator=generator) + 0.5 for _ in range(6)]
    before, after = placement not in ("post",), placement in ("post", "both")
    biased = before and kind == "layer"
    return LayerNorms(
        attention_C=rows[0] if before else None,
        mlp_C=rows[1] if before else None,
        after_attention_C=rows[2] if after else None,
        after_mlp_C=rows[3] if after else None,
        attention_bias_C=rows[4] if biased else None,
        mlp_bias_C=rows[5] if biased else None,
        layer=kind.startswith("layer"),
        unit_offset=unit_offset,
        eps=eps,
    )


def make(
    dtype: torch.dtype,
    cache: torch.dtype,
    *,
    seed: int,
    bias: bool = False,
    qk_norm: str | None = None,
    placement: str = "pre",
    norm: str = "rms",
    gated: bool = True,
    eps: float = 1e-6,
    unit_offset: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of a layer. The pool holds something in every slot already."""
    generator = torch.Generator().manual_seed(seed)
    pools = torch.randn(2, 5, 16, K, D, generator=generator)
    quantized: dict[str, Tensor] = {}
    if cache == torch.int8:
        scales = torch.rand(2, 5, 16, K, generator=generator) * 0.02 + 0.01
        pools = torch.randint(-127, 128, pools.shape, generator=generator, dtype=torch.int8)
        quantized = {"k_scale": scales[0].contiguous(), "v_scale": scales[1].contiguous()}
    heads = {"q_norm": H, "k_norm": K} if qk_norm == "full" else {"q_norm": 1, "k_norm": 1}
    head_norms = {name: torch.rand(number * D, generator=generator) + 0.5 for name, number in heads.items()}
    if qk_norm == "layer":
        shapes = {"q_norm": (H, D), "k_norm": (K, D), "k_norm_bias": (K, D)}
        head_norms = {name: torch.rand(shape, generator=generator) + 0.5 for name, shape in shapes.items()}
    return {
        "norms": norms_of(placement, norm, generator, eps=eps, unit_offset=unit_offset),
        "qkv": projection((H + 2 * K) * D, C, dtype, seed + 1, bias),
        "out": projection(C, H * D, dtype, seed + 2, bias),
        "gate_up": projection((2 if gated else 1) * FEED, C, dtype, seed + 3, bias),
        "down": projection(C, FEED, dtype, seed + 4, bias),
        "cache": Cache(pools[0].to(cache), pools[1].to(cache), **quantized),
        "num_heads": H,
        "gated": gated,
        "parallel": placement == "parallel",
        **(head_norms if qk_norm is not None else {}),
        **options,
    }


def step_tensors(step: int) -> dict[str, Any]:
    """Two requests, one new token each; the tables of their angles."""
    lengths = torch.tensor(LENGTHS, dtype=torch.int32) + step + 1
    positions = (lengths - 1).long()
    blocks = TABLE.gather(1, (positions // 16)[:, None])[:, 0].long()
    angles = positions[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003])
    return {
        "block_table_MB": TABLE,
        "lengths_M": lengths,
        "slots_M": blocks * 16 + positions % 16,
        "cos_MR": angles.cos(),
        "sin_MR": angles.sin(),
        "other_angles": ((0.7 * angles).cos(), (0.7 * angles).sin()),
    }


def apply(p: Projection, x: Tensor, dtype: torch.dtype) -> Tensor:
    weight = p.weight.to(dtype) if p.scales is None else p.weight.to(dtype) * p.scales.to(dtype)[:, None]
    return F.linear(x, weight, None if p.bias is None else p.bias.to(dtype))


def normed(x: Tensor, norms: LayerNorms, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    if weight is None:
        return x
    if norms.layer:
        return F.layer_norm(x, (C,), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), norms.eps)
    return rms_norm(x, weight.to(x.dtype), norms.eps, unit_offset=norms.unit_offset)


def feed_forward(h: Tensor, arguments: dict[str, Any]) -> Tensor:
    first, *up = apply(arguments["gate_up"], h, h.dtype).chunk(2 if arguments["gated"] else 1, dim=-1)
    activation = arguments.get("activation", "silu")
    if activation.startswith("gelu"):
        first = F.gelu(first, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        first = F.silu(first) if activation == "silu" else F.relu(first)
    return apply(arguments["down"], first * up[0] if up else first, h.dtype)


def by_torch(x: Tensor, arguments: dict[str, Any], cache: Cache, tensors: dict[str, Any]) -> Tensor:
    """One layer in the dtype of x; the cache is in that dtype, or int8."""
    dtype, norms = x.dtype, arguments["norms"]
    qk: list[Tensor | None] = [
        arguments[name].to(dtype) if name in arguments else None for name in ("q_norm", "k_norm")
    ]
    qkv = apply(arguments["qkv"], normed(x, norms, norms.attention_C, norms.attention_bias_C), dtype)
    if qk[0] is not None and qk[0].dim() == 2:
        heads = list(qkv.unflatten(1, (-1, D)).split([H, K, K], dim=1))
        for i, name in enumerate(("q_norm", "k_norm")):
            heads[i] = F.layer_norm(heads[i], (D,), eps=norms.eps) * arguments[name].to(dtype)
        heads[1] += arguments["k_norm_bias"].to(dtype)
        qkv, qk = torch.cat(heads, dim=1).flatten(1), [None, None]
    if qk[0] is not None and len(qk[0]) > D:
        parts = list(qkv.split([H * D, K * D, K * D], dim=1))
        parts[:2] = [
            rms_norm(part, weight, norms.eps, unit_offset=norms.unit_offset)
            for part, weight in zip(parts[:2], qk, strict=True)
            if weight is not None
        ]
        qkv, qk = torch.cat(parts, dim=1), [None, None]
    rotation = arguments.get("rotation", 0)
    cos, sin = tensors["other_angles"] if rotation == 1 else (tensors["cos_MR"], tensors["sin_MR"])
    cos, sin = (x[:, : 0 if rotation is None else None].to(dtype) for x in (cos, sin))
    q = write_kv_reference(
        qkv, cache.k, cache.v, tensors["slots_M"], cos, sin, qk[0], qk[1], cache.k_scale, cache.v_scale, H,
        arguments.get("interleaved", False), norms.eps, norms.unit_offset,
    )  # fmt: skip
    known = {name: arguments[name] for name in ("scale", "window", "softcap", "sinks_H") if name in arguments}
    o = paged_attention_reference(
        q, cache.k, cache.v, block_table_RM=tensors["block_table_MB"], lengths_R=tensors["lengths_M"],
        query_starts=torch.arange(3, dtype=torch.int32), k_scale_PSK=cache.k_scale, v_scale_PSK=cache.v_scale, **known,
    )  # fmt: skip
    factor = arguments.get("residual_scale", 1.0)
    attended = x + factor * normed(apply(arguments["out"], o.flatten(1), dtype), norms, norms.after_attention_C)
    h = normed(x if arguments["parallel"] else attended, norms, norms.mlp_C, norms.mlp_bias_C)
    return attended + factor * normed(feed_forward(h, arguments), norms, norms.after_mlp_C)


def copied(cache: Cache, dtype: torch.dtype) -> Cache:
    """The pools in another dtype, or int8 as they are."""
    k, v = (x.clone() if x.dtype == torch.int8 else x.to(dtype, copy=True) for x in (cache.k, cache.v))
    scales = (None if x is None else x.clone() for x in (cache.k_scale, cache.v_scale))
    return Cache(k, v, *scales)


def with_call(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same layer, its feed-forward part a function of torch."""
    return arguments | {
        "gate_up": None, "down": None, "feed_forward": lambda h_MC: feed_forward(h_MC, arguments),
    }  # fmt: skip


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("dtype", "cache", "options"),
    [
        (torch.float32, torch.float32, {}),
        (torch.float32, torch.float32, {"bias": True, "qk_norm": "head", "eps": 1e-3, "activation": "gelu_tanh"}),
        (torch.float32, torch.float32, {"interleaved": True, "window": 7, "softcap": 3.0, "scale": 0.4}),
        (torch.bfloat16, torch.float32, {"unit_offset": True, "qk_norm": "head", "sinks_H": torch.ones(H)}),
        (torch.bfloat16, torch.bfloat16, {}),
        (torch.int8, torch.bfloat16, {"bias": True}),
        (torch.int8, torch.int8, {"qk_norm": "head"}),
        (torch.float32, torch.float32, {"placement": "post", "qk_norm": "full", "eps": 1e-3}),
        (torch.float32, torch.float32, {"placement": "both", "unit_offset": True, "rotation": 1, "qk_norm": "head"}),
        (torch.bfloat16, torch.bfloat16, {"placement": "both", "residual_scale": 0.3}),
        (torch.float32, torch.float32, {"placement": "parallel", "norm": "layer", "gated": False, "bias": True}),
        (torch.float32, torch.float32, {"placement": "parallel", "norm": "layer without biases", "activation": "relu"}),
        (torch.float32, torch.float32, {"norm": "layer", "gated": False, "rotation": None, "activation": "gelu"}),
        (torch.float32, torch.float32, {"norm": "layer", "qk_norm": "layer", "placement": "parallel"}),
        (torch.float32, torch.float32, {"called": True, "residual_scale": 0.5}),
        (torch.bfloat16, torch.float32, {"called": True, "placement": "both"}),
        (torch.int8, torch.bfloat16, {"norm": "layer", "residual_scale": 0.5, "activation": "gelu", "bias": True}),
    ],
)
def test_steps_through_layers_equal_those_of_torch(
    dtype: torch.dtype, cache: torch.dtype, options: Any, batched: bool
) -> None:
    """Whole steps in loops, and those for more rows, whose products are torch's, in bf16 unless weights are fp32."""
    options = dict(options)
    calls = options.pop("called", False)
    arguments = [make(dtype, cache, seed=10 * i, **options) for i in range(3 if calls else 2)]
    caches = {work: [copied(a["cache"], work) for a in arguments] for work in (torch.float64, torch.float32)}
    layers = [DecodeLayer(**(with_call(a) if calls and i != 1 else a)) for i, a in enumerate(arguments)]
    whole = DecodeStep(layers)
    whole.loop_rows = 0 if batched else 8
    for step in range(3):
        x = torch.randn(2, C, generator=torch.Generator().manual_seed(step))
        tensors = step_tensors(step)
        results = {}
        for work, pools in caches.items():
            y = x.to(work)
            for a, pool in zip(arguments, pools, strict=True):
                y = by_torch(y, a, pool, tensors)
            results[work] = y
        found = whole.run(x.clone(), StepInputs(**tensors))
        exact = results[torch.float64]
        error, allowed = (float((y.double() - exact).abs().max()) for y in (found, results[torch.float32]))
        rounding = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.int8: 2e-2}[cache]  # of what was cached
        rounding = max(rounding, 2e-2 if batched and dtype != torch.float32 else 0.0)
        assert error <= 2 * allowed + rounding * float(exact.abs().max())


def test_bits_repeat_whatever_the_number_of_threads(threads: None) -> None:
    """More of them than cores too: those that are held up pass by what the others have done meanwhile."""
    results = []
    for number in (1, 2, 7):
        torch.set_num_threads(number)
        arguments = [
            make(torch.bfloat16, torch.bfloat16, seed=i, placement=placement)
            for i, placement in enumerate(("pre", "both", "both", "parallel") * 3)
        ]
        step = DecodeStep([DecodeLayer(**one) for one in arguments])
        for _ in range(1 if number == 1 else 30):
            x = torch.randn(2, C, generator=torch.Generator().manual_seed(0))
            results.append(step.run(x, StepInputs(**step_tensors(0))).clone())
    assert all(torch.equal(result, results[0]) for result in results)


FLOAT = torch.float32
WIDE = Projection(torch.ones(C, C))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh'; supported are silu, gelu_tanh, gelu, relu"),
        ({"num_heads": 5}, "qkv has 128 rows; expected 144 for 5 heads"),
        ({"out": WIDE}, "out takes 48 inputs; its layer gives 64"),
        ({"down": Projection(torch.ones(3, FEED))}, "out and down give 48 and 3 numbers"),
        ({"qkv": Projection(torch.ones(128, C).half())}, r"qkv is torch.float16 \(128, 48\); expected"),
        ({"down": Projection(torch.ones(C, FEED).char())}, "scales are missing for down of torch.int8"),
        ({"down": Projection(torch.ones(C, FEED), torch.ones(C))}, "scales are given with down of torch.float32"),
        ({"down": Projection(torch.ones(C, FEED), None, torch.ones(3))}, r"bias of down have shape \(3,\)"),
        ({"cache": Cache(torch.ones(5, 16, K, D).half(), torch.ones(5, 16, K, D).half())}, "caches are torch.float16"),
        (
            {"cache": Cache(torch.ones(5, 16, K, D).char(), torch.ones(5, 16, K, D).char())},
            "k_scale is missing for caches of torch.int8",
        ),
        ({"q_norm": torch.ones(D)}, "q_norm and k_norm go together"),
        ({"k_norm": torch.ones(3), "q_norm": torch.ones(D)}, r"k_norm has shape \(3,\); expected \(16,\)"),
        ({"q_norm_bias": torch.ones(H, D)}, "q_norm_bias and k_norm_bias go with norms of q and k"),
        ({"k_norm": torch.ones(K, D), "q_norm": torch.ones(3, D)}, r"q_norm has shape \(3, 16\); expected \(4, 16\)"),
        ({"sinks_H": torch.ones(3)}, r"sinks has shape \(3,\); expected \(4,\)"),
        ({"window": -1}, "window is -1"),
        ({"relative_HW": torch.ones(3, 8)}, r"relative has shape \(3, 8\); expected \(4, 8\)"),
        ({"between": torch.relu_, "parallel": True}, "between and behind go with branches one after the other"),
        ({"qkv_clip": 0.0}, "qkv_clip is 0.0; give a positive number"),
        ({"rotation": 2}, "rotation is 2; give 0 or 1"),
        ({"down": None}, "a layer has gate_up and down, or feed_forward"),
        ({"feed_forward": torch.relu}, "a layer has gate_up and down, or feed_forward"),
        ({"q_norm": torch.ones(H * D), "k_norm": torch.ones(D)}, r"k_norm has shape \(16,\); expected \(32,\)"),
        ({"norms": LayerNorms(torch.ones(3), torch.ones(C))}, r"a norm has shape \(3,\); expected \(48,\)"),
        ({"norms": LayerNorms(torch.ones(C), attention_bias_C=torch.ones(C))}, "a norm's bias goes with its weight"),
        ({"norms": LayerNorms(torch.ones(C), after_mlp_C=torch.ones(C), layer=True)}, "stands before branches only"),
        ({"norms": LayerNorms(torch.ones(C), after_mlp_C=torch.ones(C)), "parallel": True}, "have no norms after them"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeLayer(**(make(FLOAT, FLOAT, seed=0) | changes))


def test_steps_that_do_not_fit_are_refused_by_name() -> None:
    tensors, layers = step_tensors(0), [DecodeLayer(**make(FLOAT, FLOAT, seed=0))]
    with pytest.raises(ValueError, match=r"lengths is torch.int64 of 2 rows; expected torch.int32 of 2"):
        StepInputs(**(tensors | {"lengths_M": tensors["lengths_M"].long()}))
    with pytest.raises(ValueError, match=r"slots is torch.int64 of 1 rows"):
        StepInputs(**(tensors | {"slots_M": tensors["slots_M"][:1]}))
    with pytest.raises(ValueError, match="cos and sin have shapes"):
        StepInputs(**(tensors | {"cos_MR": torch.ones(2, 5)}))
    with pytest.raises(ValueError, match="a layer has rotation 0, for which the step brings no angles"):
        decode_layers(torch.ones(2, C), layers, StepInputs(**(tensors | {"cos_MR": None, "sin_MR": None})))
    inputs = StepInputs(**tensors)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16"):
        decode_layers(torch.ones(2, C).bfloat16(), layers, inputs)
    with pytest.raises(ValueError, match="x has width 47, a layer 48"):
        decode_layers(torch.ones(2, 47), layers, inputs)


def test_layers_need_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "available", lambda: False)
    monkeypatch.setattr(layer, "why_not", lambda: "it is not there")
    with pytest.raises(RuntimeError, match="compiled layers cannot be used here: it is not there"):
        DecodeLayer(**make(FLOAT, FLOAT, seed=0))
