"""The feed-forward layer on the CPU, and the launch configurations of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.joined import joined_linear, linear
from trine.kernels.mlp.activation import ACTIVATIONS, activate, gated, gated_joined
from trine.kernels.mlp.op import GATED_ACTIVATIONS, gated_mlp, gated_mlp_reference, mlp, mlp_reference
from trine.kernels.mlp.projection import TUNABLES, shared_estimate
from trine.kernels.target import COMPILED, INTERPRETER

LIMIT = 0.9


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(dtype: torch.dtype, weights: torch.dtype, n: int = 6, c: int = 5, f: int = 7) -> list[Tensor]:
    """x, gate, up and down weights, and the three biases."""
    sizes = ((f, c), (f, c), (c, f), (f,), (f,), (c,))
    return [make(n, c, dtype=dtype)] + [make(*size, seed=i, dtype=weights) for i, size in enumerate(sizes, 1)]


def call(function: Any, tensors: list[Tensor], activation: str) -> Tensor:
    limit = LIMIT if activation == "swiglu_clamped" else None
    x, gate, up, down, gate_bias, up_bias, down_bias = tensors
    result: Tensor = function(
        x, gate, up, down, activation=activation, limit=limit,
        gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias,
    )  # fmt: skip
    return result


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gated_mlp_is_its_reference_in_float64(activation: str) -> None:
    tensors = [t.requires_grad_() for t in layer(torch.float64, torch.float64)]
    expected = call(gated_mlp_reference, tensors, activation)
    y = call(gated_mlp, tensors, activation)
    torch.testing.assert_close(y, expected)
    mine, theirs = (torch.autograd.grad(r.square().sum(), tensors) for r in (y, expected))
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(call(gated_mlp, tensors, activation), expected)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_gradients_by_differences(activation: str) -> None:
    tensors = [t.requires_grad_() for t in layer(torch.float64, torch.float64, 3, 2, 3)]
    assert torch.autograd.gradcheck(lambda *t: call(gated_mlp, list(t), activation), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_reference_in_float64(activation: str) -> None:
    x, _, up, down, _, up_bias, down_bias = layer(torch.float64, torch.float64)
    options = {"up_bias": up_bias, "down_bias": down_bias}
    y = mlp(x, up, down, activation=activation, **options)
    torch.testing.assert_close(y, mlp_reference(x, up, down, activation=activation, **options))
    expected = activate(x @ up.T + up_bias, activation) @ down.T + down_bias
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_joined_and_separate_products(dtype: torch.dtype, weights: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in layer(dtype, weights, 33, 64, 48)]
    x, gate, up, down, gate_bias, up_bias, down_bias = tensors
    joined = gated_joined(joined_linear(x, (gate, up), (gate_bias, up_bias)), "silu")
    expected = linear(joined, down, down_bias)
    y = call(gated_mlp, tensors, "silu")
    assert torch.equal(y, expected)
    dy = make(33, 64, seed=9, dtype=dtype)
    for a, b, t in zip(*(torch.autograd.grad(r, tensors, dy) for r in (y, expected)), tensors, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == t.dtype
    with torch.no_grad():
        apart = linear(gated(linear(x, gate, gate_bias), linear(x, up, up_bias), "silu"), down, down_bias)
        assert torch.equal(call(gated_mlp, tensors, "silu"), apart)
        plain = F.linear(activate(linear(x, up), "relu"), down.to(dtype))
        assert torch.equal(mlp(x, up, down, activation="relu"), plain)


def test_leading_dimensions() -> None:
    x, gate, up, down, *_ = layer(torch.float32, torch.float32, 6)
    for shape in ((6, 5), (2, 3, 5), (1, 2, 3, 5)):
        assert gated_mlp(x.view(shape), gate, up, down, activation="silu").shape == shape
        assert mlp(x.view(shape), up, down, activation="gelu").shape == shape
    assert gated_mlp(x[:0], gate, up, down, activation="silu").shape == (0, 5)
    assert gated_mlp(x[0], gate, up, down, activation="silu").shape == (5,)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": zeros(2, 4)}, r"gate_weight has shape \(7, 5\).*expected \(7, 4\)"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\).*\[\.\.\., C\]"),
        ({"gate": zeros(6, 5)}, r"gate_weight has shape \(6, 5\)"),
        ({"up": zeros(7)}, r"up_weight \(7,\)"),
        ({"down": zeros(7, 5)}, r"down_weight has shape \(7, 5\).*expected \(5, 7\)"),
        ({"down_bias": zeros(7)}, r"down_bias has shape \(7,\).*expected \(5,\)"),
        ({"gate_bias": zeros(7)}, "both or neither"),
        ({"x": zeros(2, 5).int()}, "x is torch.int32"),
        ({"activation": "tanh"}, "'tanh'; it must be one of silu"),
        ({"limit": 7.0}, "limit is 7.0 with activation 'silu'"),
        ({"activation": "swiglu_clamped"}, "limit is None with activation 'swiglu_clamped'"),
        ({"activation": "swiglu_clamped", "limit": -1.0}, "must be positive"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": zeros(2, 5), "gate": zeros(7, 5), "up": zeros(7, 5), "down": zeros(5, 7)}
    given = {**given, "activation": "silu", **changed}
    weights = [given.pop(name) for name in ("x", "gate", "up", "down")]
    with pytest.raises(ValueError, match=message):
        gated_mlp(*weights, **given)


def test_plain_layer_refuses_the_clamped_unit() -> None:
    with pytest.raises(ValueError, match="'swiglu_clamped'; it must be one of"):
        mlp(zeros(2, 5), zeros(7, 5), zeros(5, 7), activation="swiglu_clamped")


def test_joined_layers_have_biases_all_or_none() -> None:
    with pytest.raises(ValueError, match="2 layers are joined but 1 have a bias"):
        joined_linear(zeros(2, 5), (zeros(3, 5), zeros(3, 5)), (zeros(3), None))


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 17, 64, 100, 128, 8192])
def test_configurations_fit(rows: int, dtype: torch.dtype, target: Any) -> None:
    for (is_gated, _), tunable in TUNABLES.items():
        config = tunable.pick(dtype, target, N=rows, C=4096, F=14336, exact_erf=0)
        assert all(size & (size - 1) == 0 for size in config.blocks.values())
        assert all(config.blocks[name] >= 16 for name in ("ROWS", "COLUMNS", "BLOCK_C"))
        assert shared_estimate(config, dtype, 1 + is_gated) <= target.shared_bytes
        if not target.interpreted and rows >= 128 and dtype != torch.float32:
            assert config.num_warps == 8
            candidates = tunable.candidates({"N": rows, "C": 4096, "F": 14336}, dtype, target)
            assert 3 < len(candidates) < 40
            assert all(shared_estimate(c, dtype, 1 + is_gated) <= target.shared_bytes for c in candidates)
