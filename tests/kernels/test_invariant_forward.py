"""The units, the log-probabilities and the probe of a forward whose bits depend on no other row, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu import compiled
from trine.kernels.invariant import probe as module
from trine.kernels.invariant.elementwise import invariant_log_probs, invariant_mlp, invariant_unit
from trine.kernels.invariant.probe import Sizes, probe
from trine.kernels.mlp.activation import ACTIVATIONS, activate, gated_clamped
from trine.kernels.mlp.op import CLAMPED, gated_mlp, mlp

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SMALL = Sizes(width=36, ffn_width=100, vocab_size=131, num_heads=3, num_kv_heads=1, head_dim=12)


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact_unit(gate: Tensor | None, up: Tensor, activation: str) -> Tensor:
    if gate is None:
        return activate(up, activation)
    return gated_clamped(gate, up, 3.0) if activation == CLAMPED else activate(gate, activation) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_gate", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
def test_units_and_their_gradients(activation: str, with_gate: bool, dtype: torch.dtype) -> None:
    if activation == CLAMPED and not with_gate:
        with pytest.raises(ValueError, match="activation is 'swiglu_clamped'"):
            invariant_unit(None, make(2, 3), activation)
        return
    limit = 3.0 if activation == CLAMPED else None
    leaves = [(3 * make(7, 50, seed=n)).to(dtype).requires_grad_() for n in range(1 + with_gate)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = invariant_unit(leaves[1] if with_gate else None, leaves[0], activation, limit)
    expected = exact_unit(exact[1] if with_gate else None, exact[0], activation)
    dy = make(7, 50, seed=5, dtype=dtype)
    mine, theirs = torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, exact, dy.double())
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}[dtype]
    for a, b in zip((found, *mine), (expected, *theirs), strict=True):
        assert a.dtype == dtype
        assert float((a.detach().double() - b.detach()).abs().max()) <= bound * max(1.0, float(b.detach().abs().max()))


def test_units_of_large_numbers_are_numbers() -> None:
    x = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    for activation in ("silu", "gelu", "gelu_tanh"):
        found = invariant_unit(None, x, activation)
        torch.testing.assert_close(found, torch.where(x > 0, x, 0.0), rtol=0, atol=1e-30)


@pytest.mark.usefixtures("threads")
@DTYPES
@pytest.mark.parametrize("width", [100, 1001])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_a_unit_has_the_same_bits_among_any_rows(activation: str, width: int, dtype: torch.dtype) -> None:
    gate, up = make(120, width, dtype=dtype), make(120, width, seed=1, dtype=dtype)
    together = invariant_unit(gate, up, activation)
    for count in (1, 2, 3, 7, 33):
        for first in (0, 1, 120 - count):
            rows = slice(first, first + count)
            assert torch.equal(invariant_unit(gate[rows], up[rows], activation), together[rows])


def test_the_ordinary_unit_and_product_give_one_row_other_bits() -> None:
    """In float32: the negative of what this mode promises."""
    x, weight = make(32, 1001), make(512, 1001, seed=1)
    many, one = F.silu(x), torch.cat([F.silu(row[None].clone()) for row in x])
    assert not torch.equal(many, one)
    many, one = F.linear(x, weight), torch.cat([F.linear(row[None], weight) for row in x])
    assert not torch.equal(many, one)


@DTYPES
@pytest.mark.parametrize("with_gate", [True, False], ids=["gated", "plain"])
def test_the_layer_is_that_of_the_ordinary_mode_but_for_rounding(with_gate: bool, dtype: torch.dtype) -> None:
    gate, up, down = make(60, 40, seed=1) / 6, make(60, 40, seed=2) / 6, make(40, 60, seed=3) / 8
    x = make(2, 9, 40, dtype=dtype)
    biases: dict[str, Any] = {"up_bias": make(60, seed=4), "down_bias": make(40, seed=5)}
    found = invariant_mlp(x, gate if with_gate else None, up, down, activation="silu", **biases)
    if with_gate:
        biases["gate_bias"] = torch.zeros(60)
        expected = gated_mlp(x, gate, up, down, activation="silu", **biases)
    else:
        expected = mlp(x, up, down, activation="silu", **biases)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol={torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3), "tanh"), "activation is 'tanh'"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), "silu", 1.0), "limit is 1.0"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), CLAMPED), "limit is None"),
        ((torch.zeros(2, 3), torch.zeros(2, 4), "silu"), "must agree"),
        ((torch.zeros(2, 3).half(), torch.zeros(2, 3), "silu"), "must agree"),
    ],
    ids=["name", "limit", "no limit", "shape", "dtype"],
)
def test_units_refuse_what_does_not_fit(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        invariant_unit(*arguments)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("vocab_size", [31, 32, 1001, 50257])
def test_log_probabilities(vocab_size: int) -> None:
    logits = make(40, vocab_size) * 3
    together = invariant_log_probs(logits)
    torch.testing.assert_close(together.double(), logits.double().log_softmax(dim=-1), rtol=1e-6, atol=1e-5)
    for row in (0, 7, 39):
        assert torch.equal(invariant_log_probs(logits[row]), together[row])


def ordinary_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# --- the probe --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not compiled.available(), reason=compiled.why_not() or "")
@pytest.mark.usefixtures("threads")
@DTYPES
def test_this_machine_keeps_the_bits(dtype: torch.dtype) -> None:
    assert probe(dtype, "cpu", SMALL) == ()


@pytest.mark.parametrize(
    ("name", "spoilt", "what"),
    [
        ("invariant_matmul", lambda x, weight_FC: F.linear(x, weight_FC), "linear layers"),
        ("rms_norm", lambda x, weight_C, eps: x * weight_C * (1 + 2**-20 * (len(x) == 5)), "norms"),
        ("invariant_unit", lambda gate, up, activation: up * (1 + 2**-20 * (len(up) == 5)), "the unit"),
        ("invariant_log_probs", lambda x: x * (1 + 2**-20 * (len(x) == 5)), "log-probabilities"),
        ("rope", lambda x, cos, sin: x * (1 + 2**-20 * (x.shape[1] == 5)), "rotary positions"),
        ("invariant_attention", lambda q, k, v, sequences: ordinary_attention(q, k, v), "attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_probe_names_what_changes_its_bits(
    name: str, spoilt: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, spoilt)
    module._probe.cache_clear()
    found = [sentence for sentence in probe(torch.float32, "cpu", SMALL) if sentence.startswith(what)]
    module._probe.cache_clear()
    assert len(found) == 1


def test_the_probe_says_why_attention_cannot_be_used() -> None:
    (found,) = (sentence for sentence in probe(torch.float64, "cpu", SMALL) if sentence.startswith("attention"))
    assert "use float32 or bfloat16" in found
