"""Mixture of experts on the CPU, routing, and the launch configurations of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.kernels.cpu import matvec
from trine.kernels.cpu.compiled import available, why_not
from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.moe.combine import combine
from trine.kernels.moe.configs import (
    GATED_BACKWARD,
    GATED_FORWARD,
    MATMUL,
    WEIGHT_GRADIENT,
    shared_estimate,
    weight_shared_estimate,
)
from trine.kernels.moe.groups import MAX_EXPERTS, group_by_expert
from trine.kernels.moe.matmul import grouped_matmul, grouped_matmul_reference
from trine.kernels.moe.op import moe_mlp, moe_mlp_reference
from trine.kernels.moe.routing import load_balancing_loss, route, router_z_loss, top_k_ids
from trine.kernels.target import COMPILED, INTERPRETER

LIMIT = 0.9
NAMES = ("gate_bias", "up_bias", "down_bias")


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choose(n: int, k: int, e: int) -> Tensor:
    return torch.rand(n, e, generator=torch.Generator().manual_seed(3)).topk(k, dim=-1).indices


def layer(
    dtype: torch.dtype, experts: torch.dtype, n: int = 7, k: int = 2, e: int = 4, c: int = 5, f: int = 6
) -> list[Tensor]:
    """x, weights of pairs, gate, up and down weights, and the three biases."""
    sizes = ((e, f, c), (e, f, c), (e, c, f), (e, f), (e, f), (e, c))
    made = [make(n, c, dtype=dtype), make(n, k, seed=9, dtype=torch.promote_types(dtype, torch.float32))]
    return made + [make(*size, seed=i, dtype=experts) for i, size in enumerate(sizes, 1)]


def call(function: Any, tensors: list[Tensor], ids: Tensor, activation: str = "silu") -> Tensor:
    limit = LIMIT if activation == "swiglu_clamped" else None
    x, weights, gate, up, down, *biases = tensors
    named = dict(zip(NAMES, biases, strict=False))
    result: Tensor = function(x, ids, weights, gate, up, down, activation=activation, limit=limit, **named)
    return result


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_moe_mlp_is_its_reference_in_float64(activation: str) -> None:
    tensors = [t.requires_grad_() for t in layer(torch.float64, torch.float64)]
    ids = choose(7, 2, 5)  # id 4 stands for no expert
    assert (ids == 4).any()
    expected = call(moe_mlp_reference, tensors, ids, activation)
    y = call(moe_mlp, tensors, ids, activation)
    torch.testing.assert_close(y, expected)
    mine, theirs = (torch.autograd.grad(r.square().sum(), tensors) for r in (y, expected))
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(call(moe_mlp, tensors, ids, activation), expected)


@pytest.mark.skipif(not available(), reason=why_not() or "")
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_take_compiled_loops(dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient, and only then."""
    monkeypatch.setattr(matvec, "choose", lambda kind, rows, among: "loops")
    calls: list[int] = []
    original = matvec.compiled_matvec

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(len(x))
        return original(x, *rest)

    monkeypatch.setattr(matvec, "compiled_matvec", counted)
    tensors, ids = layer(dtype, dtype, n=3, c=40, f=33), choose(3, 2, 4)
    tensors = [tensor / 4 if tensor.dim() == 3 else tensor for tensor in tensors]
    expected = call(moe_mlp_reference, [tensor.double() for tensor in tensors], ids, activation)
    with torch.no_grad():
        found = call(moe_mlp, tensors, ids, activation)
    assert sum(calls) == 3 * 3 * 2  # products of each pair
    assert float((found.double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    call(moe_mlp, [tensor.requires_grad_() for tensor in tensors], ids, activation)
    assert sum(calls) == 3 * 3 * 2


def test_the_reference_by_hand() -> None:
    """Each token by itself, as the formula reads."""
    tensors, ids = layer(torch.float64, torch.float64), choose(7, 2, 4)
    x, weights, gate, up, down, bg, bu, bd = tensors
    expected = torch.zeros_like(x)
    for n in range(7):
        for k in range(2):
            e = int(ids[n, k])
            h = F.silu(gate[e] @ x[n] + bg[e]) * (up[e] @ x[n] + bu[e])
            expected[n] += weights[n, k] * (down[e] @ h + bd[e])
    torch.testing.assert_close(call(moe_mlp_reference, tensors, ids), expected)


def test_gradients_by_differences() -> None:
    tensors = [t.requires_grad_() for t in layer(torch.float64, torch.float64, 3, 2, 3, 2, 3)]
    ids = choose(3, 2, 3)
    assert torch.autograd.gradcheck(lambda *t: call(moe_mlp, list(t), ids, "swiglu_clamped"), tensors)


@pytest.mark.parametrize("experts", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_results_and_gradients(dtype: torch.dtype, experts: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in layer(dtype, experts, 33, 2, 4, 16, 24)]
    ids = choose(33, 2, 4)
    y = call(moe_mlp, tensors, ids)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = call(moe_mlp_reference, exact, ids)
    half = torch.bfloat16 in (dtype, experts)
    results = [y, *torch.autograd.grad(y.float().sum(), tensors)]
    for a, b, like in zip(results, [expected, *torch.autograd.grad(expected.sum(), exact)], [y, *tensors], strict=True):
        assert a.dtype == like.dtype
        assert float((a.detach().double() - b.detach()).abs().max()) <= (0.05 if half else 1e-5) * float(
            b.detach().abs().max()
        )
    assert y.dtype == dtype


def test_a_weight_gradient_is_not_full_size_per_expert() -> None:
    """Experts are unbound at once: one gradient of all, not a sum of one padded gradient for each."""
    tensors = [t.requires_grad_() for t in layer(torch.float32, torch.float32)]
    y = call(moe_mlp, tensors, choose(7, 2, 4))
    names, pending = set(), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in names:
            names.add(node)
            pending += [parent for parent, _ in node.next_functions]
    found = {node.name() for node in names}
    assert "UnbindBackward0" in found
    assert "SelectBackward0" not in found


def test_leading_dimensions() -> None:
    x, weights, *experts = layer(torch.float32, torch.float32, 6)
    ids = choose(6, 2, 4)
    expected = call(moe_mlp, [x, weights, *experts], ids)
    for shape in ((2, 3), (1, 2, 3)):
        y = call(moe_mlp, [x.view(*shape, 5), weights.view(*shape, 2), *experts], ids.view(*shape, 2))
        assert torch.equal(y, expected.view(*shape, 5))


@pytest.mark.parametrize("n", [0, 3], ids=["no tokens", "no experts"])
def test_nothing_to_do(n: int) -> None:
    tensors = [t.requires_grad_() for t in layer(torch.float32, torch.float32, n)]
    ids = torch.full((n, 2), 4)
    y = call(moe_mlp, tensors, ids)
    assert y.shape == (n, 5)
    assert not y.any()
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()
    x, up = tensors[0], tensors[3]
    rows = grouped_matmul(x, up, group_by_expert(ids, 4))
    assert rows.shape == (2 * n, 6)
    assert not any(gradient.any() for gradient in torch.autograd.grad(rows.sum(), (x, up)))


def test_experts_without_tokens_get_zero_gradients() -> None:
    tensors = [t.requires_grad_() for t in layer(torch.float32, torch.float32)]
    gradients = torch.autograd.grad(call(moe_mlp, tensors, torch.full((7, 2), 3)).sum(), tensors)
    for gradient in gradients[2:]:
        assert not gradient[:3].any()
        assert gradient[3].any()


def test_slots_of_no_expert_add_nothing() -> None:
    x, weights, *experts = layer(torch.float32, torch.float32)
    ids = choose(7, 2, 4)
    ids[2], ids[5, 1] = 4, 4
    expected = call(moe_mlp, [x, weights * (ids < 4), *experts], ids.clamp(max=3))
    weights[ids == 4] = float("nan")
    torch.testing.assert_close(call(moe_mlp, [x, weights, *experts], ids), expected)
    assert not expected[2].any()


# --- against transformers ---------------------------------------------------------------------------------------------


def perturbed(module: nn.Module) -> Any:
    """The module with random parameters and buffers, and no gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return module.eval().requires_grad_(False)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_mixtral() -> None:
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralConfig,
        MixtralSparseMoeBlock,
        load_balancing_loss_func,
    )

    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block, x = perturbed(MixtralSparseMoeBlock(config)), make(2, 9, 16)
    logits = F.linear(x, block.gate.weight)
    ids, weights = route(logits, 2, order="softmax_top_k", renormalise=True)
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    same(moe_mlp(x, ids, weights, gate, up, block.experts.down_proj, activation="silu"), block(x))
    flat = logits.view(-1, 5)
    same(load_balancing_loss(logits, ids), load_balancing_loss_func((flat,), 5, 2))
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    same(load_balancing_loss(logits, ids, mask_N=mask), load_balancing_loss_func((flat,), 5, 2, mask.long()))
    both = (flat, make(18, 5, seed=5))
    chosen = torch.cat([route(part, 2, order="softmax_top_k")[0] for part in both])
    same(load_balancing_loss(torch.cat(both), chosen), load_balancing_loss_func(both, 5, 2))


@pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "plain"])
def test_qwen3_moe(renormalise: bool) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, norm_topk_prob=renormalise
    )
    config._experts_implementation = "eager"
    block, x = perturbed(Qwen3MoeSparseMoeBlock(config)), make(2, 9, 16)
    ids, weights = route(F.linear(x, block.gate.weight), 3, order="softmax_top_k", renormalise=renormalise)
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    same(moe_mlp(x, ids, weights, gate, up, block.experts.down_proj, activation="silu"), block(x))


def test_gpt_oss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP

    config = GptOssConfig(
        hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=3, num_hidden_layers=1
    )
    config._experts_implementation = "eager"
    block, x = perturbed(GptOssMLP(config)), make(2, 9, 16) * 6
    logits = F.linear(x, block.router.weight, block.router.bias)
    ids, weights = route(logits, 3, order="top_k_softmax")
    experts = block.experts
    gate_up, bias = experts.gate_up_proj.mT, experts.gate_up_proj_bias
    assert float((x.view(-1, 1, 16) @ experts.gate_up_proj[0]).abs().max()) > experts.limit
    y = moe_mlp(
        x, ids, weights, gate_up[:, ::2], gate_up[:, 1::2], experts.down_proj.mT,
        activation="swiglu_clamped", limit=experts.limit,
        gate_bias=bias[:, ::2], up_bias=bias[:, 1::2], down_bias=experts.down_proj_bias,
    )  # fmt: skip
    torch.testing.assert_close(y, block(x)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "plain"])
def test_deepseek_v3_routing(renormalise: bool) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=renormalise,
    )  # fmt: skip
    router, x = perturbed(DeepseekV3TopkRouter(config)), make(40, 16)
    logits, expected, expected_ids = router(x)
    bias = router.e_score_correction_bias
    options: dict[str, Any] = {"order": "sigmoid_top_k", "renormalise": renormalise, "scale": 2.5}
    ids, weights = route(logits, 3, selection_bias_E=bias, num_groups=4, kept_groups=2, **options)
    for found, of_theirs in ((weights, expected), (ids, expected_ids)):
        zeros = torch.zeros(40, 12, dtype=found.dtype)
        same(zeros.scatter(1, ids, found), zeros.scatter(1, expected_ids, of_theirs))
    for changed in ({"num_groups": 1, "kept_groups": 1}, {"selection_bias_E": None}):
        others = route(logits, 3, **{"selection_bias_E": bias, "num_groups": 4, "kept_groups": 2, **options, **changed})
        assert not torch.equal(others[0], ids)


# --- routing ----------------------------------------------------------------------------------------------------------


def test_equal_scores_go_to_the_smaller_id() -> None:
    scores = torch.tensor([[1.0, 3, 3, 2, 3, 2], [0, -0.0, 0, -1, -0.0, -1], [-5, -2, -9, -2, -5, -9]])
    assert top_k_ids(scores, 4).tolist() == [[1, 2, 4, 3], [0, 1, 2, 4], [1, 3, 0, 4]]
    infinite = float("inf")
    scores = torch.tensor([[-infinite] * 3 + [0, infinite], [-infinite, float("nan"), infinite, -float("nan"), 0]])
    assert top_k_ids(scores, 5).tolist() == [[4, 3, 0, 1, 2], [1, 3, 2, 4, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_top_k_is_a_stable_sort(dtype: torch.dtype) -> None:
    scores = make(500, 64, dtype=dtype).mul(4).round().div(4)  # many are equal
    expected = torch.sort(scores.float(), dim=-1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(top_k_ids(scores, 8), expected)


def test_orders() -> None:
    logits = make(50, 8, dtype=torch.float64)
    ids, weights = route(logits, 3, order="softmax_top_k")
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(weights, probabilities.topk(3).values)
    ids_renormalised, renormalised = route(logits, 3, order="softmax_top_k", renormalise=True)
    assert torch.equal(ids, ids_renormalised)
    torch.testing.assert_close(renormalised, weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(renormalised, route(logits, 3, order="top_k_softmax")[1])
    _, scaled = route(logits, 3, order="softmax_top_k", scale=2.5)
    torch.testing.assert_close(scaled, weights * 2.5)
    assert route(logits.bfloat16(), 3, order="softmax_top_k")[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("order", "renormalise"),
    [
        ("softmax_top_k", False),
        ("softmax_top_k", True),
        ("sigmoid_top_k", False),
        ("sigmoid_top_k", True),
        ("top_k_softmax", False),
    ],
)
def test_routing_gradients_by_differences(order: str, renormalise: bool) -> None:
    logits = make(4, 6, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"num_groups": 3, "kept_groups": 2} if order == "sigmoid_top_k" else {}
    call = lambda x: route(x, 2, order=order, renormalise=renormalise, scale=1.5, **options)[1]  # noqa: E731
    assert torch.autograd.gradcheck(call, logits)


def test_losses() -> None:
    even = torch.zeros(6, 3)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)
    torch.testing.assert_close(load_balancing_loss(even, ids), torch.tensor(2.0))
    torch.testing.assert_close(router_z_loss(even), torch.tensor(3.0).log().square())
    logits = make(6, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(router_z_loss(logits, mask_N=mask), logits.logsumexp(-1)[mask].square().mean())
    torch.testing.assert_close(
        load_balancing_loss(logits, ids, mask_N=mask), load_balancing_loss(logits[mask], ids[mask])
    )
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(x, ids, mask_N=mask), logits)
    assert torch.autograd.gradcheck(lambda x: router_z_loss(x, mask_N=mask), logits)
    none = torch.zeros(6, dtype=torch.bool)
    assert not router_z_loss(logits, mask_N=none)
    assert not load_balancing_loss(logits, ids, mask_N=none)
    assert torch.equal(load_balancing_loss(logits.view(2, 3, 3), ids.view(2, 3, 2)), load_balancing_loss(logits, ids))


# --- grouped products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gather", [True, False], ids=["tokens", "rows"])
def test_grouped_matmul(gather: bool) -> None:
    ids = choose(9, 2, 5)
    groups = group_by_expert(ids, 4)
    x = make(9 if gather else 18, 5, dtype=torch.float64).requires_grad_()
    weight, bias = make(4, 3, 5, dtype=torch.float64).requires_grad_(), make(4, 3, seed=1, dtype=torch.float64)
    bias.requires_grad_()
    y = grouped_matmul(x, weight, groups, bias_EF=bias, gather=gather)
    flat, rows = ids.flatten(), groups.row_P.tolist()
    for pair in range(18):
        e, row = int(flat[pair]), rows[pair]
        one = x[pair // 2] if gather else x[row]
        torch.testing.assert_close(y[row], torch.zeros(3).double() if e == 4 else weight[e] @ one + bias[e])
    assert torch.equal(y, grouped_matmul_reference(x, weight, groups, bias_EF=bias, gather=gather))
    function = lambda *t: grouped_matmul(t[0], t[1], groups, bias_EF=t[2], gather=gather)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_combine_adds_in_fp32_in_the_order_of_slots() -> None:
    groups = group_by_expert(torch.tensor([[2, 0, 1]]), 3)
    rows = torch.tensor([[-256.0], [1.0], [256.0]]).bfloat16()  # of slots 1, 2, 0
    y = combine(rows, torch.ones(1, 3), groups)
    assert y.dtype == torch.bfloat16
    assert y.item() == 1
    tensors = [make(6, 4, dtype=torch.float64).requires_grad_(), make(2, 3, dtype=torch.float64).requires_grad_()]
    groups = group_by_expert(torch.tensor([[2, 0, 1], [0, 1, 2]]), 3)
    assert torch.autograd.gradcheck(lambda rows, weights: combine(rows, weights, groups), tensors)


# --- refusals ---------------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": zeros(2, 4)}, r"gate_weight has shape \(3, 7, 5\).*expected \(3, 7, 4\)"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\).*\[\.\.\., C\]"),
        ({"up": zeros(7, 5)}, r"up_weight \(7, 5\); expected \[\.\.\., C\] and \[E, F, C\]"),
        ({"gate": zeros(3, 6, 5)}, r"gate_weight has shape \(3, 6, 5\)"),
        ({"down": zeros(3, 7, 5)}, r"down_weight has shape \(3, 7, 5\).*expected \(3, 5, 7\)"),
        ({"down_bias": zeros(3, 7)}, r"down_bias has shape \(3, 7\).*expected \(3, 5\)"),
        ({"gate_bias": zeros(3, 7)}, "both or neither"),
        ({"x": zeros(2, 5).int()}, "x is torch.int32"),
        ({"weights": zeros(2, 2).int()}, "weights is torch.int32"),
        ({"weights": zeros(2, 3)}, r"weights has shape \(2, 3\) but expert_ids has \(2, 2\)"),
        ({"ids": zeros(3, 2).long(), "weights": zeros(3, 2)}, r"expert_ids has shape \(3, 2\) but x has \(2, 5\)"),
        ({"ids": zeros(2, 2)}, "expert_ids is torch.float32; it must be int32 or int64"),
        ({"ids": zeros(2, 0).long(), "weights": zeros(2, 0)}, "K of at least 1"),
        ({"ids": zeros(2, 2).long() + 4}, r"expert_ids are 4 to 4; they must be from 0 to 3"),
        ({"ids": zeros(2, 2).long() - 1}, r"expert_ids are -1 to -1"),
        ({"activation": "tanh"}, "'tanh'; it must be one of silu"),
        ({"limit": 7.0}, "limit is 7.0 with activation 'silu'"),
        ({"activation": "swiglu_clamped"}, "limit is None with activation 'swiglu_clamped'"),
        ({"activation": "swiglu_clamped", "limit": -1.0}, "must be positive"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": zeros(2, 5), "ids": zeros(2, 2).long(), "weights": zeros(2, 2)}
    given |= {"gate": zeros(3, 7, 5), "up": zeros(3, 7, 5), "down": zeros(3, 5, 7), "activation": "silu", **changed}
    tensors = [given.pop(name) for name in ("x", "ids", "weights", "gate", "up", "down")]
    with pytest.raises(ValueError, match=message):
        moe_mlp(*tensors, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "softmax"}, "'softmax'; it must be one of softmax_top_k"),
        ({"order": "top_k_softmax", "renormalise": True}, "no meaning"),
        ({"order": "softmax_top_k", "num_groups": 2, "kept_groups": 1}, "options of order 'sigmoid_top_k'"),
        ({"order": "softmax_top_k", "selection_bias_E": zeros(8)}, "options of order 'sigmoid_top_k'"),
        ({"order": "sigmoid_top_k", "selection_bias_E": zeros(7)}, r"shape \(7,\); expected \(8,\)"),
        ({"order": "sigmoid_top_k", "num_groups": 3}, "must divide the 8 experts"),
        ({"order": "sigmoid_top_k", "num_groups": 2, "kept_groups": 3}, "at most all"),
        ({"order": "sigmoid_top_k", "num_groups": 8, "kept_groups": 1}, "1 of 8 experts can be chosen"),
        ({"order": "softmax_top_k", "num_slots": 9}, "num_slots is 9; 8 of 8"),
        ({"order": "softmax_top_k", "num_slots": 0}, "num_slots is 0"),
    ],
    ids=str,
)
def test_bad_routing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(zeros(4, 8), **{"num_slots": 2, **options})


def test_other_bad_input_is_refused() -> None:
    groups = group_by_expert(zeros(2, 2).long(), 3)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 7, 5\); expected \[3, F, C\]"):
        grouped_matmul(zeros(2, 5), zeros(2, 7, 5), groups)
    with pytest.raises(ValueError, match=r"expected x of \(4, 5\).*gather=False"):
        grouped_matmul(zeros(2, 5), zeros(3, 7, 5), groups, gather=False)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\); expected \(3, 7\)"):
        grouped_matmul(zeros(2, 5), zeros(3, 7, 5), groups, bias_EF=zeros(7))
    with pytest.raises(ValueError, match=r"weight is torch\.int32"):
        grouped_matmul(zeros(2, 5), zeros(3, 7, 5).int(), groups)
    with pytest.raises(ValueError, match=r"expected \[4, C\]"):
        combine(zeros(2, 5), zeros(2, 2), groups)
    with pytest.raises(ValueError, match=r"weights have shape \(2,\); expected \(2, 2\)"):
        combine(zeros(4, 5), zeros(2), groups)
    with pytest.raises(ValueError, match=r"rows are torch\.int64"):
        combine(zeros(4, 5).long(), zeros(2, 2), groups)
    for number in (0, MAX_EXPERTS + 1):
        with pytest.raises(ValueError, match=f"{number} experts; 1 to {MAX_EXPERTS}"):
            group_by_expert(zeros(2, 2).long(), number)
    with pytest.raises(ValueError, match=r"logits are torch\.int64"):
        route(zeros(2, 3).long(), 1, order="softmax_top_k")
    with pytest.raises(ValueError, match=r"mask is torch.int64 \(2,\); expected torch.bool"):
        router_z_loss(zeros(2, 3), mask_N=zeros(2).long())
    with pytest.raises(ValueError, match=r"expert_ids has shape \(3, 2\)"):
        load_balancing_loss(zeros(2, 3), zeros(3, 2).long())


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*COMPILED.values(), INTERPRETER], ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 17, 1024, 65536])
def test_configurations_fit(pairs: int, dtype: torch.dtype, target: Any) -> None:
    shape = {"P": pairs, "E": 8, "C": 4096, "F": 14336}
    for tunable, products in ((GATED_FORWARD, 2), (GATED_BACKWARD, 2), (MATMUL[False], 1), (MATMUL[True], 1)):
        config = tunable.pick(dtype, target, **shape)
        assert all(size & (size - 1) == 0 for size in config.blocks.values())
        assert all(config.blocks[name] >= 16 for name in ("ROWS", "COLUMNS", "BLOCK_K"))
        assert shared_estimate(config, dtype, products) <= target.shared_bytes
        if not target.interpreted and pairs >= 1024 and dtype != torch.float32:
            assert (config.blocks["ROWS"], config.num_warps) == (128, 8)
            candidates = tunable.candidates(shape, dtype, target)
            assert 3 < len(candidates) < 40
            assert all(shared_estimate(c, dtype, products) <= target.shared_bytes for c in candidates)
    for gathered in (0, 1):
        shape["exact_gathered"] = gathered
        for config in (WEIGHT_GRADIENT.pick(dtype, target, **shape), *WEIGHT_GRADIENT.candidates(shape, dtype, target)):
            assert all(config.blocks[name] >= 16 for name in ("LEFT", "RIGHT", "ROWS"))
            assert weight_shared_estimate(config, dtype, bool(gathered)) <= target.shared_bytes


def test_tiles_are_as_high_as_experts_are_busy() -> None:
    heights = [
        MATMUL[False].pick(torch.bfloat16, COMPILED["sm_80"], P=pairs, E=128, C=2048, F=768).blocks["ROWS"]
        for pairs in (8, 128 * 16, 128 * 17, 128 * 60, 128 * 100, 128 * 1000)
    ]
    assert heights == [16, 16, 32, 64, 128, 128]
