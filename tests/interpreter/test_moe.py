"""Grouping, grouped matrix products and the mixture-of-experts layer in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.mlp.activation import activate
from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.moe.combine import combine, moe_combine
from trine.kernels.moe.groups import Groups, group_by_expert, moe_group, most_tiles, tile_list
from trine.kernels.moe.matmul import grouped_matmul, grouped_matmul_forward
from trine.kernels.moe.op import moe_mlp, moe_mlp_forward
from trine.kernels.moe.routing import load_balancing_loss, route, router_z_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Tokens, slots, experts, width, feed-forward width; blocks are of 16, and blocks of pairs of 32.
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1, 1, 5, 3), (9, 2, 4, 20, 18), (40, 3, 5, 16, 16), (19, 3, 3, 7, 33)], ids=str
)
LIMIT = 0.9
NAMES = ("gate_bias", "up_bias", "down_bias")
Shape = tuple[int, int, int, int, int]


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choose(num_tokens: int, num_slots: int, num_experts: int, *, none: bool = False) -> Tensor:
    """Different experts for each token, expert 1 seldom; with `none` also slots of no expert."""
    scores = torch.rand(num_tokens, num_experts + none, generator=torch.Generator().manual_seed(7))
    if num_experts > 1:
        scores[:, 1] *= 0.3
    return scores.topk(num_slots, dim=-1).indices


def inputs(
    shape: Shape, dtype: torch.dtype, experts: torch.dtype | None = None, *, bias: bool = False
) -> tuple[Tensor, ...]:
    """x, weights of pairs (fp32), gate, up and down weights, and the three biases."""
    n, k, e, c, f = shape
    kind = experts or dtype
    made = [make(n, c, dtype=dtype), make(n, k, seed=9).sigmoid()]
    made += [make(*s, seed=i).div(s[2] ** 0.5).to(kind) for i, s in enumerate(((e, f, c), (e, f, c), (e, c, f)), 1)]
    made += [make(*s, dtype=kind, seed=i) for i, s in enumerate(((e, f), (e, f), (e, c)), 4)] if bias else []
    return tuple(made)


def ours(*tensors: Tensor, ids: Tensor, activation: str) -> Tensor:
    x, weights, gate, up, down, *biases = tensors
    limit = LIMIT if activation == "swiglu_clamped" else None
    named = dict(zip(NAMES, biases, strict=False))
    return moe_mlp(x, ids, weights, gate, up, down, activation=activation, limit=limit, **named)


def plain_unit(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, activation) * up


def plain_linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def plain(*tensors: Tensor, ids: Tensor, activation: str) -> Tensor:
    """Expert by expert in the dtype of x, as models are usually written."""
    x, weights, gate, up, down, *biases = tensors
    y = torch.zeros_like(x)
    for e in range(len(up)):
        tokens, slots = torch.where(ids == e)
        bg, bu, bd = (b[e] for b in biases) if biases else (None, None, None)
        h = plain_unit(plain_linear(x[tokens], gate[e], bg), plain_linear(x[tokens], up[e], bu), activation)
        one = plain_linear(h, down[e], bd) * weights[tokens, slots, None]
        y = y.index_add(0, tokens, one.to(x.dtype))
    return y


def check(compare: Any, activation: str, ids: Tensor, tensors: tuple[Tensor, ...]) -> None:
    compare.gradients(
        "moe_mlp",
        lambda *t: ours(*t, ids=ids, activation=activation),
        lambda *t: plain(*t, ids=ids, activation=activation),
        tensors,
    )


# --- grouping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 2, 4), (40, 3, 5), (70, 1, 2), (33, 8, 128), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_groups_are_a_stable_sort(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, e = shape
    ids = torch.randint(0, e + 1, (n, k), generator=torch.Generator().manual_seed(0)).to(dtype)
    groups = group_by_expert(ids, e)
    order = torch.sort(ids.flatten().long(), stable=True).indices
    assert torch.equal(groups.pair_P.long(), order)
    assert torch.equal(groups.row_P[order].long(), torch.arange(n * k))
    counts = torch.bincount(ids.flatten().long(), minlength=e + 1)
    assert torch.equal(groups.offset.long(), counts.cumsum(0) - counts)
    assert {t.dtype for t in groups[:3]} == {torch.int32}


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_tiles_cover_every_expert_once(rows: int) -> None:
    for ids in (torch.zeros(40, 2, dtype=torch.long), choose(40, 2, 5), choose(40, 2, 5, none=True), choose(1, 1, 3)):
        num_experts = int(ids.max()) + 1
        groups = group_by_expert(ids, num_experts)
        ends = groups.offset.tolist()
        expected = [(e, row) for e in range(num_experts) for row in range(ends[e], ends[e + 1], rows)]
        found = [(int(e), int(row)) for e, row in tile_list(groups, rows).T]
        assert found[: len(expected)] == expected
        assert all(e == num_experts for e, _ in found[len(expected) :])
        assert len(found) == most_tiles(ids.numel(), num_experts, rows)


def test_the_bound_of_tiles_is_reached() -> None:
    counts = torch.tensor([1, 17, 1, 33])
    ids = torch.repeat_interleave(torch.arange(4), counts)[:, None]
    tiles = tile_list(group_by_expert(ids, 4), 16)
    assert tiles.shape[1] == int(torch.ceil(counts / 16).sum()) == most_tiles(52, 4, 16)
    assert int(tiles[0].max()) < 4


def test_ids_out_of_range_belong_to_no_expert() -> None:
    groups = group_by_expert(torch.tensor([[1, -3], [9, 0], [2, 1]]), 2)
    assert groups.offset.tolist() == [0, 1, 3]
    assert groups.pair_P.tolist() == [3, 0, 5, 1, 2, 4]


# --- grouped products -------------------------------------------------------------------------------------------------


def plain_product(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups, gather: bool) -> Tensor:
    ends = groups.offset.tolist()
    rows = x[groups.pair_P.long() // groups.num_slots] if gather else x
    parts = [
        plain_linear(rows[ends[e] : ends[e + 1]], weight[e], None if bias is None else bias[e])
        for e in range(len(weight))
    ]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weight.shape[1])])


@DTYPES
@SHAPES
@pytest.mark.parametrize("gather", [True, False], ids=["tokens", "rows"])
def test_grouped_matmul(compare: Any, gather: bool, shape: Shape, dtype: torch.dtype) -> None:
    n, k, e, c, f = shape
    none = e > 1
    groups = group_by_expert(choose(n, k, e, none=none), e)
    x = make(n if gather else n * k, c, dtype=dtype)
    weight, bias = make(e, f, c, seed=1).div(c**0.5).to(dtype), make(e, f, seed=2, dtype=dtype)
    tensors = (x, weight, bias) if gather else (x, weight)

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return grouped_matmul(x, weight, groups, bias_EF=bias, gather=gather)

    def plainly(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain_product(x, weight, bias, groups, gather)

    compare.gradients("grouped_matmul", function, plainly, tensors)


@DTYPES
@SHAPES
def test_combine(compare: Any, shape: Shape, dtype: torch.dtype) -> None:
    n, k, e, c, _ = shape
    groups = group_by_expert(choose(n, k, e, none=e > 1), e)
    rows, weights = make(n * k, c, dtype=dtype), make(n, k, seed=1, dtype=dtype)
    places = groups.row_P.long()
    owned = (places < groups.offset[-1]).view(n, k, 1)

    def plainly(rows: Tensor, weights: Tensor) -> Tensor:
        return (rows[places].view(n, k, c) * weights[..., None] * owned).sum(1)

    compare.gradients("combine", lambda r, w: combine(r, w, groups), plainly, (rows, weights))


# --- the layer --------------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_moe_mlp(compare: Any, bias: bool, shape: Shape) -> None:
    check(compare, "silu", choose(*shape[:3]), inputs(shape, torch.float32, bias=bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "swiglu_clamped"])
def test_moe_mlp_in_half_precision(compare: Any, activation: str, dtype: torch.dtype) -> None:
    shape = (19, 2, 4, 33, 35)
    check(compare, activation, choose(*shape[:3]), inputs(shape, dtype, bias=activation != "silu"))


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_activations(compare: Any, activation: str) -> None:
    shape = (9, 2, 3, 10, 18)
    check(compare, activation, choose(*shape[:3]), inputs(shape, torch.float32, bias=True))


@DTYPES
def test_experts_of_another_dtype(compare: Any, dtype: torch.dtype) -> None:
    other = torch.float16 if dtype == torch.float32 else torch.float32
    shape = (9, 2, 3, 20, 18)
    check(compare, "silu", choose(*shape[:3]), inputs(shape, dtype, other, bias=True))


def test_one_expert_takes_everything(compare: Any) -> None:
    shape = (20, 1, 4, 8, 18)
    tensors = inputs(shape, torch.float32, bias=True)
    check(compare, "silu", torch.full((20, 1), 2), tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(ours(*leaves, ids=torch.full((20, 1), 2), activation="silu").sum(), leaves)
    for gradient in gradients[2:]:
        assert not gradient[[0, 1, 3]].any()
        assert gradient[2].any()


def test_a_token_may_choose_an_expert_twice(compare: Any) -> None:
    shape = (5, 3, 2, 8, 18)
    check(compare, "silu", torch.tensor([[0, 0, 1]] * 5), inputs(shape, torch.float32))


def test_slots_of_no_expert_add_nothing(compare: Any) -> None:
    shape = (9, 2, 3, 8, 18)
    ids = choose(*shape[:3], none=True)
    ids[4] = 3
    assert (ids == 3).sum() > 2
    tensors = inputs(shape, torch.float32, bias=True)
    check(compare, "silu", ids, tensors)
    tensors[1][ids == 3] = float("nan")
    y = ours(*tensors, ids=ids, activation="silu")
    assert torch.isfinite(y).all()
    assert not y[4].any()


def test_fused_halves_are_read_in_place(compare: Any) -> None:
    shape = (9, 2, 3, 20, 18)
    x, weights, gate, up, down, gate_bias, up_bias, down_bias = inputs(shape, torch.float32, bias=True)
    both, both_bias = torch.cat([gate, up], dim=1), torch.cat([gate_bias, up_bias], dim=1)
    ids = choose(*shape[:3])

    def fused(call: Any) -> Any:
        def function(x: Tensor, weights: Tensor, both: Tensor, down: Tensor, both_bias: Tensor) -> Tensor:
            halves, biases = both.chunk(2, dim=1), both_bias.chunk(2, dim=1)
            return call(x, weights, *halves, down, *biases, down_bias.to(x.dtype), ids=ids, activation="silu")

        return function

    compare.gradients("moe_mlp", fused(ours), fused(plain), (x, weights, both, down, both_bias))


def test_leading_dimensions_and_strides() -> None:
    shape = (30, 2, 3, 10, 18)
    x, weights, *experts = inputs(shape, torch.float32)
    ids = choose(*shape[:3])
    expected = plain(x, weights, *experts, ids=ids, activation="silu")
    wide = torch.zeros(2, 15, 20)
    wide[..., ::2] = x.view(2, 15, 10)
    strided = [w.mT.contiguous().mT for w in experts]
    pairs = weights.t().contiguous().t().view(2, 15, 2)
    found = ours(wide[..., ::2], pairs, *strided, ids=ids.view(2, 15, 2), activation="silu")
    torch.testing.assert_close(found, expected.view(2, 15, 10))
    torch.testing.assert_close(ours(x[3], weights[3], *experts, ids=ids[3], activation="silu"), expected[3])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8, 16), (3, 2, 3, 8, 0), (3, 2, 3, 0, 5)], ids=str)
def test_empty(shape: Shape) -> None:
    n, k, e, *_ = shape
    tensors = [t.requires_grad_() for t in inputs((*shape[:3], max(1, shape[3]), max(1, shape[4])), torch.float32)]
    x, weights, gate, up, down = tensors
    c, f = shape[3:]
    cut = [x[:, :c], weights, gate[:, :f, :c], up[:, :f, :c], down[:, :c, :f]]
    ids = choose(max(n, 1), k, e)[:n]
    y = ours(*cut, ids=ids, activation="silu")
    assert y.shape == (n, c)
    assert not y.any()
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_nan_travels_to_its_token_only() -> None:
    shape = (9, 2, 3, 8, 16)
    tensors = inputs(shape, torch.float32)
    tensors[0][1, 2] = float("nan")
    for activation in GATED_ACTIVATIONS:
        y = ours(*tensors, ids=choose(*shape[:3]), activation=activation)
        assert torch.isnan(y[1]).all(), activation
        assert torch.isfinite(y[[0, *range(2, 9)]]).all()


def test_saves_only_what_it_was_given_and_the_order_of_pairs() -> None:
    shape = (17, 2, 3, 8, 64)
    tensors = [t.requires_grad_() for t in inputs(shape, torch.float32)]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ours(*tensors, ids=choose(*shape[:3]), activation="silu")
    floats = [t for t in saved if t.is_floating_point()]
    assert {t.untyped_storage().data_ptr() for t in floats} == {t.untyped_storage().data_ptr() for t in tensors}
    assert sum(t.nbytes for t in floats) == sum(t.nbytes for t in tensors)
    assert sum(t.numel() for t in saved if not t.is_floating_point()) == 2 * 34 + 4
    y.sum().backward()


def test_only_needed_gradients_are_computed() -> None:
    shape = (9, 2, 3, 8, 18)
    tensors, ids = inputs(shape, torch.float32, bias=True), choose(9, 2, 3)
    full = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(ours(*full, ids=ids, activation="silu").square().sum(), full)
    for place, gradient in enumerate(expected):
        some = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
        y = ours(*some, ids=ids, activation="silu")
        assert torch.equal(torch.autograd.grad(y.square().sum(), some[place])[0], gradient)


# --- registration -----------------------------------------------------------------------------------------------------


def test_registration() -> None:
    x, weights, gate, up, down, bg, bu, bd = (
        t.requires_grad_() for t in inputs((5, 2, 3, 8, 18), torch.float32, bias=True)
    )
    ids = choose(5, 2, 3)
    groups = group_by_expert(ids, 3)
    torch.library.opcheck(moe_group, (ids, 3))
    torch.library.opcheck(grouped_matmul_forward, (x, up, bu, *groups, True))
    rows = grouped_matmul(x, up, groups).detach().requires_grad_()
    torch.library.opcheck(grouped_matmul_forward, (rows, down, None, *groups, False))
    torch.library.opcheck(moe_combine, (rows, weights, *groups))
    torch.library.opcheck(moe_mlp_forward, (x, weights, gate, up, down, bg, bu, bd, *groups, "silu", None))
    frozen = (gate, up.detach(), down, None, None, None)
    torch.library.opcheck(moe_mlp_forward, (x, weights, *frozen, *groups, "swiglu_clamped", 7.0))


def test_compiles_whole_and_under_checkpointing() -> None:
    x, _, *experts = (t.requires_grad_() for t in inputs((5, 2, 3, 8, 18), torch.float32))
    logits = make(5, 3, seed=40).requires_grad_()

    def function(x: Tensor, logits: Tensor) -> Tensor:
        ids, weights = route(logits, 2, order="softmax_top_k", renormalise=True)
        groups = group_by_expert(ids, 3)
        rows = grouped_matmul(x, experts[1], groups)
        y = ours(x[None], weights[None], *experts, ids=ids[None], activation="silu").square()
        balance = load_balancing_loss(logits, ids) + router_z_loss(logits)
        return y.sum() + combine(rows, weights, groups).sum() + balance

    expected = torch.autograd.grad(function(x, logits), (x, logits))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(function, x, logits, use_reentrant=False)
    for result in (compiled(x, logits), again):
        for a, b in zip(torch.autograd.grad(result, (x, logits)), expected, strict=True):
            assert torch.equal(a, b)


def test_float64_is_refused_before_launch() -> None:
    x, weights, *experts = inputs((2, 1, 2, 4, 6), torch.float64)
    ids = choose(2, 1, 2)
    for tensors in ((x, weights), (x.float(), weights.double())):
        with pytest.raises(ValueError, match="float64 is not supported"):
            ours(*tensors, *experts, ids=ids, activation="silu")
    groups = group_by_expert(ids, 2)
    with pytest.raises(ValueError, match="float64 is not supported"):
        grouped_matmul(x, experts[0], groups)
    with pytest.raises(ValueError, match="float64 is not supported"):
        combine(x, weights.double(), groups)
