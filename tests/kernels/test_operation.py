"""Registered operations are run without the dispatcher, and through it wherever somebody has to see them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trine.kernels.operation import run

calls: list[tuple[str, bool]] = []


def _inside_dispatcher() -> bool:
    """Whether torch's wrapper of a registered function called this."""
    return any(frame.f_code.co_name == "backend_impl" for frame, _ in traceback.walk_stack(None))


@torch.library.custom_op("trine_tests::scaled", mutates_args=())
def scaled(x: Tensor, weight: Tensor | None, factor: float, transpose: bool) -> tuple[Tensor, Tensor]:
    calls.append(("scaled", _inside_dispatcher()))
    assert isinstance(factor, float)
    y = x * factor if weight is None else x * weight * factor
    return (y.t() if transpose else y), x.sum()


@scaled.register_fake
def _(x: Tensor, weight: Tensor | None, factor: float, transpose: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return (y.t() if transpose else y), x.new_empty(())


@torch.library.custom_op("trine_tests::scaled_back", mutates_args=())
def scaled_back(dy: Tensor, x: Tensor, weight: Tensor | None, factor: float) -> list[Tensor]:
    calls.append(("scaled_back", _inside_dispatcher()))
    return [dy * factor, x.new_empty(0)] if weight is None else [dy * weight * factor, (dy * x * factor).sum(0)]


@scaled_back.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor | None, factor: float) -> list[Tensor]:
    return [torch.empty_like(dy), x.new_empty(0) if weight is None else torch.empty_like(weight)]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.factor, ctx.transpose = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    dx, dweight = run(scaled_back, dy.t() if ctx.transpose else dy, x, weight, ctx.factor)
    assert ctx.needs_input_grad[0]
    return dx, None if weight is None else dweight, None, None


scaled.register_autograd(_backward, setup_context=_context)


@torch.library.custom_op("trine_tests::total", mutates_args=())
def total(tensors: list[Tensor]) -> Tensor:
    calls.append(("total", _inside_dispatcher()))
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


@torch.library.custom_op("trine_tests::doubled", mutates_args=("x",))
def doubled(x: Tensor) -> None:
    calls.append(("doubled", _inside_dispatcher()))
    x.mul_(2)


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    calls.clear()


def leaves() -> tuple[Tensor, nn.Parameter]:
    return torch.randn(3, 4, requires_grad=True), nn.Parameter(torch.randn(4))


@pytest.mark.parametrize("transpose", [False, True])
def test_results_and_gradients_are_those_of_the_dispatcher(transpose: bool) -> None:
    (x, weight), found = leaves(), []
    for call in (scaled, lambda *arguments: run(scaled, *arguments)):
        y, extra = call(x, weight, 1.5, transpose)
        assert not extra.requires_grad
        found.append((y.detach(), extra, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert calls == [("scaled", True), ("scaled_back", False), ("scaled", False), ("scaled_back", False)]


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    x, weight = leaves()
    with torch.no_grad():
        y, _ = run(scaled, x, weight, 1.5, False)
    assert not y.requires_grad
    y, _ = run(scaled, x.detach(), None, 1.5, False)
    assert not y.requires_grad
    assert calls == [("scaled", False)] * 2


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operation() -> None:
    x, weight = leaves()
    with Seen() as seen:
        run(scaled, x, weight, 1.5, False)[0].sum().backward()
    assert {"trine_tests::scaled", "trine_tests::scaled_back"} <= set(seen.names)
    with FakeTensorMode() as mode:
        y, _ = run(scaled, mode.from_tensor(x), None, 1.5, True)
    assert y.shape == (4, 3)
    with FlopCounterMode(display=False):
        run(scaled, x, weight, 1.5, False)
    assert [inside for _, inside in calls] == [True] * 3


def test_the_compiler_sees_the_operation() -> None:
    torch._dynamo.reset()
    x, weight = leaves()
    targets: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def function(x: Tensor) -> Tensor:
        return run(scaled, x, weight, 1.5, False)[0].square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(function(x), (x, weight))
    found = torch.autograd.grad(compiled(x), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "trine_tests.scaled.default" in targets


class Other(Tensor):
    """A subclass that runs like a tensor."""


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x: (x, None, 2, False),
        lambda x: (x.as_subclass(Other), None, 1.5, False),
        lambda x: (x, None, 1.5, 0),
    ],
)
def test_what_is_not_just_what_is_declared_is_left_to_the_dispatcher(
    arguments: Callable[[Tensor], tuple[Any, ...]],
) -> None:
    given = arguments(torch.ones(3, 4))
    y, _ = run(scaled, *given)
    assert torch.equal(y, torch.full((3, 4), float(given[2])))
    assert calls == [("scaled", True)]


def test_tensors_without_memory_have_shapes() -> None:
    y, _ = run(scaled, torch.empty(3, 4, device="meta"), None, 1.5, True)
    assert (y.shape, y.is_meta) == ((4, 3), True)
    assert calls == []


def test_gradients_of_what_has_no_backward_are_refused() -> None:
    x, weight = leaves()
    assert run(total, [x.detach(), weight.detach()]).shape == ()
    with torch.no_grad():
        run(total, [x, weight])
    assert calls == [("total", False)] * 2
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        run(total, [x, weight]).backward()
    y, _ = run(scaled, x, weight, 1.5, False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_transforms_are_left_to_the_dispatcher() -> None:
    with pytest.raises(RuntimeError, match=r"vmap|functorch|setup_context"):
        torch.func.grad(lambda x: run(scaled, x, None, 1.5, False)[0].sum())(torch.ones(3, 4))


def test_an_operation_may_change_what_autograd_never_sees() -> None:
    x = torch.ones(3)
    run(doubled, x)
    assert calls == [("doubled", False)]
    assert torch.equal(x, torch.full((3,), 2.0))
    run(doubled, nn.Parameter(x))
    assert calls[1:] == [("doubled", True)]
