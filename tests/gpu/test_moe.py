"""Mixture of experts on a GPU at real sizes, against float64 on the same GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from trine.kernels.mlp.op import GATED_ACTIVATIONS
from trine.kernels.moe.combine import combine
from trine.kernels.moe.groups import group_by_expert
from trine.kernels.moe.matmul import grouped_matmul, grouped_matmul_reference
from trine.kernels.moe.op import moe_mlp, moe_mlp_reference
from trine.kernels.moe.routing import load_balancing_loss, route, router_z_loss, top_k_ids

# Error over the root mean square of the exact values: (largest, mean). Most results are sums of many rounded products,
# so that errors are a few roundings of a typical value; gradients of experts with one token are products, and are
# allowed two units in the last place beside.
BOUNDS = {torch.float32: (3e-4, 1e-5), torch.bfloat16: (1.2e-1, 1e-2), torch.float16: (2e-2, 2e-3)}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BIASES = ("gate_bias", "up_bias", "down_bias")
Shape = tuple[int, int, int, int, int]
# Tokens, slots, experts, width, feed-forward width.
LAYERS: dict[str, Shape] = {
    "mixtral": (2048, 2, 8, 4096, 14336),
    "qwen3_moe": (4096, 8, 128, 2048, 768),
    "gpt_oss": (2048, 4, 32, 2880, 2880),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def make(
    shape: Shape, dtype: torch.dtype, experts: torch.dtype | None = None, *, bias: bool = True, exact: bool = False
) -> list[Tensor]:
    """x, weights of pairs, gate, up and down weights, and the three biases.

    With `exact` gate and up are sums of small fractions, without rounding: no limit is passed by rounding alone.
    """
    n, k, e, c, f = shape
    kind = experts or dtype
    x, weights = draw(n, c, seed=0), draw(n, k, seed=1).sigmoid()
    sizes = ((e, f, c), (e, f, c), (e, c, f))
    layers = [draw(*size, seed=place) / size[2] ** 0.5 for place, size in enumerate(sizes, 2)]
    biases = [draw(*size, seed=place) for place, size in enumerate(((e, f), (e, f), (e, c)), 5)] if bias else []
    if exact:
        x, layers[:2] = fraction(x, 4), [fraction(w * c**0.5 / 8, 64) for w in layers[:2]]
        biases[:2] = [fraction(b, 16) for b in biases[:2]]
    tensors = [x.to(dtype), weights, *(t.to(kind) for t in (*layers, *biases))]
    return [t.requires_grad_() for t in tensors]


def fraction(x: Tensor, parts: int) -> Tensor:
    return (x * parts).round().clamp(-2 * parts, 2 * parts) / parts


def choose(shape: Shape) -> Tensor:
    """Different experts for each token, expert 1 seldom and the last never, if there are more than slots."""
    n, k, e, *_ = shape
    scores = torch.rand(n, e, device="cuda", generator=torch.Generator("cuda").manual_seed(9))
    if e > k + 1:
        scores[:, 1] *= 0.4
        scores[:, -1] = -1
    return scores.topk(k, dim=-1).indices


def call(tensors: list[Tensor], ids: Tensor, activation: str, function: object = moe_mlp) -> Tensor:
    limit = 1.0 if activation == "swiglu_clamped" else None
    x, weights, gate, up, down, *biases = tensors
    named = dict(zip(BIASES, biases, strict=False))
    result: Tensor = function(x, ids, weights, gate, up, down, activation=activation, limit=limit, **named)  # type: ignore[operator]
    return result


def like(y: Tensor) -> Tensor:
    return draw(*y.shape, seed=20).to(y.dtype)


def check(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    largest, mean = BOUNDS[dtype]
    for place, (a, b) in enumerate(zip(found, exact, strict=True)):
        size = float(b.detach().square().sum().div(b.count_nonzero().clamp(min=1)).sqrt())  # many experts have no token
        error = (a.detach().double() - b.detach()).abs()
        above = float((error - 2 * torch.finfo(a.dtype).eps * b.detach().abs()).max())
        assert above <= largest * size, f"result {place}: largest error {above / size:.2e}"
        assert float(error.mean()) <= mean * size, f"result {place}: mean error {float(error.mean()) / size:.2e}"


def compare(tensors: list[Tensor], ids: Tensor, activation: str, dtype: torch.dtype) -> None:
    y = call(tensors, ids, activation)
    dy = like(y)
    found = [y.detach(), *torch.autograd.grad(y, tensors, dy)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = call(exact, ids, activation, moe_mlp_reference)
    check(found, [expected.detach(), *torch.autograd.grad(expected, exact, dy.double())], dtype)


@HALF
@pytest.mark.parametrize("name", LAYERS)
def test_moe_mlp(name: str, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB of GPU memory for the layer in float64")
    clamped = name == "gpt_oss"
    tensors = make(LAYERS[name], dtype, bias=clamped, exact=clamped)
    compare(tensors, choose(LAYERS[name]), "swiglu_clamped" if clamped else "silu", dtype)


@DTYPES
@pytest.mark.parametrize("activation", [name for name in GATED_ACTIVATIONS if name != "swiglu_clamped"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    shape = (1024, 2, 8, 1024, 1408)
    # The slope of relu jumps where a gate's sign could be decided by rounding.
    compare(make(shape, dtype, exact=activation == "relu"), choose(shape), activation, dtype)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 128, 2048, 768), (5, 1, 3, 123, 65), (129, 3, 5, 72, 257), (300, 4, 4, 64, 128), (33, 2, 300, 96, 40)],
    ids=str,
)
def test_odd_shapes(shape: Shape, dtype: torch.dtype) -> None:
    compare(make(shape, dtype), choose(shape), "silu", dtype)


@DTYPES
def test_no_tokens(dtype: torch.dtype) -> None:
    tensors = make((0, 2, 4, 64, 128), dtype)
    y = call(tensors, choose((0, 2, 4, 64, 128)), "silu")
    assert y.shape == (0, 64)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), tensors))


@DTYPES
def test_one_expert_takes_everything(dtype: torch.dtype) -> None:
    shape = (4096, 1, 16, 512, 768)
    tensors, ids = make(shape, dtype), torch.full((4096, 1), 5, device="cuda")
    x, weights, *experts = tensors
    y = call(tensors, ids, "silu")
    dy = like(y)
    gradients = torch.autograd.grad(y, tensors, dy)
    for gradient in gradients[2:]:
        assert not gradient[:5].any()
        assert not gradient[6:].any()
    exact = [t.detach().double().requires_grad_() for t in (x, weights, *(w[5:6] for w in experts))]
    expected = call(exact, torch.zeros_like(ids), "silu", moe_mlp_reference)
    others = torch.autograd.grad(expected, exact, dy.double())
    found = [y.detach(), *gradients[:2], *(gradient[5:6] for gradient in gradients[2:])]
    check(found, [expected.detach(), *others], dtype)


def test_weights_in_fp32_get_gradients_in_fp32() -> None:
    shape = (2048, 2, 8, 512, 768)
    tensors, ids = make(shape, torch.bfloat16, torch.float32), choose(shape)
    y = call(tensors, ids, "silu")
    dy = like(y)
    found = torch.autograd.grad(y, tensors, dy)
    exact = [t.detach().double().requires_grad_() for t in tensors[:2]]
    exact += [t.detach().bfloat16().double().requires_grad_() for t in tensors[2:]]
    expected = call(exact, ids, "silu", moe_mlp_reference)
    check([y.detach(), *found], [expected.detach(), *torch.autograd.grad(expected, exact, dy.double())], torch.bfloat16)
    for tensor, gradient in zip(tensors, found, strict=True):
        assert gradient.dtype == tensor.dtype
    # Not rounded to bf16 on the way.
    assert not any(torch.equal(gradient.bfloat16().float(), gradient) for gradient in found[2:5])


@DTYPES
@pytest.mark.parametrize("gather", [True, False], ids=["tokens", "rows"])
def test_grouped_matmul_and_combine(gather: bool, dtype: torch.dtype) -> None:
    n, k, e, c, f = shape = (2000, 4, 16, 1024, 520)
    ids = choose(shape)
    ids[7] = e  # no expert
    groups = group_by_expert(ids, e)
    made = (
        draw(n if gather else n * k, c, seed=0),
        draw(e, f, c, seed=1) / c**0.5,
        draw(e, f, seed=2),
        draw(n, k, seed=3),
    )
    tensors = [t.to(dtype).requires_grad_() for t in made]
    rows = grouped_matmul(tensors[0], tensors[1], groups, bias_EF=tensors[2], gather=gather)
    assert not rows[-k:].any()
    y = combine(rows, tensors[3], groups)
    dy = like(y)
    found = [y.detach(), *torch.autograd.grad(y, tensors, dy)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    product = grouped_matmul_reference(exact[0], exact[1], groups, bias_EF=exact[2], gather=gather)
    expected = (product[groups.row_P.long()].view(n, k, f) * exact[3][..., None]).sum(1)
    check(found, [expected.detach(), *torch.autograd.grad(expected, exact, dy.double())], dtype)


@pytest.mark.parametrize("shape", [(8192, 2, 8), (70001, 8, 128), (8192, 8, 256), (3000, 3, 1000)], ids=str)
def test_groups_are_a_stable_sort(shape: tuple[int, int, int]) -> None:
    n, k, e = shape
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, e + 1, (n, k), device="cuda", generator=generator)
    groups = group_by_expert(ids, e)
    assert torch.equal(groups.pair_P.long(), torch.sort(ids.flatten(), stable=True).indices)
    assert torch.equal(groups.row_P[groups.pair_P.long()].long(), torch.arange(n * k, device="cuda"))
    ends = torch.searchsorted(ids.flatten().sort().values, torch.arange(e + 1, device="cuda"))
    assert torch.equal(groups.offset.long(), ends)


def test_routing_is_that_of_the_cpu() -> None:
    logits = draw(4096, 128, seed=0).mul(4).round().div(4)  # many are equal
    assert torch.equal(top_k_ids(logits, 8).cpu(), top_k_ids(logits.cpu(), 8))
    for order in ("softmax_top_k", "top_k_softmax", "sigmoid_top_k"):
        groups = {"num_groups": 8, "kept_groups": 4} if order == "sigmoid_top_k" else {}
        leaves = [logits.clone().requires_grad_(), logits.cpu().requires_grad_()]
        results = []
        for leaf in leaves:
            ids, weights = route(leaf, 8, order=order, **groups)  # type: ignore[arg-type]
            loss = load_balancing_loss(leaf, ids) + router_z_loss(leaf) + weights.square().sum()
            results.append((ids.cpu(), weights.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-6)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within this block every operation of torch that waits for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not find every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_gpu() -> None:
    shape = (512, 4, 16, 256, 384)
    tensors, logits = make(shape, torch.bfloat16), draw(512, 16, seed=30).requires_grad_()

    def step() -> None:
        ids, weights = route(logits, 4, order="softmax_top_k", renormalise=True)
        y = call([tensors[0], weights, *tensors[2:]], ids, "silu")
        loss = y.float().square().mean() + load_balancing_loss(logits, ids) + router_z_loss(logits)
        torch.autograd.grad(loss, [logits, tensors[0], *tensors[2:]])

    step()  # compiles
    with no_waiting():
        step()


@DTYPES
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    shape = (3000, 4, 16, 1024, 1408)
    tensors, logits = make(shape, dtype), draw(3000, 16, seed=30).requires_grad_()
    runs = []
    for _ in range(2):
        ids, weights = route(logits, 4, order="softmax_top_k")
        y = call([tensors[0], weights, *tensors[2:]], ids, "silu")
        runs.append([ids, y, *torch.autograd.grad(y, [logits, tensors[0], *tensors[2:]], like(y))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def needs_memory() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")


def test_offsets_past_2_to_the_31_in_the_hidden_layer() -> None:
    """h and its gradients have more than 2^31 numbers; the last tokens are compared."""
    needs_memory()
    shape = (2**17 + 5, 2, 4, 64, 2**13 + 64)
    assert shape[0] * shape[1] * shape[4] > 2**31
    tensors, ids = make(shape, torch.bfloat16, bias=False), choose(shape)
    y = call(tensors, ids, "silu")
    dx, dweights = torch.autograd.grad(y.sum(), tensors[:2])
    last = [t.detach()[-300:].double().requires_grad_() for t in tensors[:2]]
    expected = call([*last, *(t.detach().double() for t in tensors[2:])], ids[-300:], "silu", moe_mlp_reference)
    exact = [expected.detach(), *torch.autograd.grad(expected.sum(), last)]
    check([y[-300:], dx[-300:], dweights[-300:]], exact, torch.bfloat16)


def test_offsets_past_2_to_the_31_in_tokens() -> None:
    """x and y, and the rows of pairs, have more than 2^31 numbers."""
    needs_memory()
    shape = (2**19 + 5, 1, 4, 4096, 32)
    assert shape[0] * shape[3] > 2**31
    tensors, ids = make(shape, torch.bfloat16, bias=False), choose(shape)
    with torch.no_grad():
        y = call(tensors, ids, "silu")
        last = [t[-300:].double() for t in tensors[:2]]
        expected = call([*last, *(t.double() for t in tensors[2:])], ids[-300:], "silu", moe_mlp_reference)
    check([y[-300:]], [expected], torch.bfloat16)


def test_offsets_past_2_to_the_31_in_weights() -> None:
    needs_memory()
    e, f, c = 130, 4096, 4096
    assert e * f * c > 2**31
    weight = torch.empty(e, f, c, device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(5)
    for one in weight:
        one.normal_(std=c**-0.5, generator=generator)
    weight.requires_grad_()
    x = draw(512, c, seed=0).bfloat16().requires_grad_()
    groups = group_by_expert((e - 1 - torch.arange(512, device="cuda") % 2)[:, None], e)
    y = grouped_matmul(x, weight, groups)
    dy = like(y)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    last, ones = weight.detach()[-1].double(), groups.pair_P.long()[-256:]
    exact = [x[ones].double() @ last.T, dy[-256:].double() @ last, dy[-256:].double().T @ x[ones].double()]
    check([y[-256:], dx[ones], dweight[-1]], exact, torch.bfloat16)
    assert not dweight[:-2].any()


def test_keeps_no_activation_for_the_backward() -> None:
    shape = (8192, 4, 16, 512, 1024)
    tensors, ids = make(shape, torch.bfloat16), choose(shape)
    call(tensors, ids, "silu")  # what a first call allocates for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = call(tensors, ids, "silu")
    kept = torch.cuda.memory_allocated() - before
    assert kept <= y.nbytes + 2 * 4 * ids.numel() + 2**21
