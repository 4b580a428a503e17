"""Are a contestant's numbers right? Its results and first gradient, in part, against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trine.benchmarks.kernel_problem import Problem, Results

Backward = Callable[[], tuple[Tensor, ...]]


class Expected:
    """The exact values of a problem's part, and the gradients that its backward starts from."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.gradients: tuple[Tensor, ...] = ()
        first, *rest = (x.detach().double() if x.is_floating_point() else x for x in problem.cut)
        if problem.leaves:
            first.requires_grad_()
        self.first = first
        self.results = as_tuple(problem.exact(first, *rest))

    def backward(self, results: tuple[Tensor, ...]) -> Backward | None:
        """The backward of a contestant that gave `results`; all start from the same random gradients."""
        leaves = self.problem.leaves
        if not leaves:
            return None
        if not self.gradients:
            generator = torch.Generator(results[0].device).manual_seed(1)
            self.gradients = tuple(
                torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in results
            )
        # In the layout of the result, as the operation after it gives them.
        given = [torch.empty_like(y).copy_(dy.view(y.shape)) for dy, y in zip(self.gradients, results, strict=True)]
        return lambda: torch.autograd.grad(results, leaves, given, retain_graph=True)

    def errors(self, results: tuple[Tensor, ...], backward: Backward | None) -> tuple[float, float | None]:
        """Of the results, and of the gradient of the first leaf."""
        part = self.problem.part
        forward = max(
            error_of(part(y.detach()), exact)
            for y, exact in zip(results, self.results, strict=not self.problem.in_place)
        )
        if backward is None:
            return forward, None
        given = [part(dy).to(y.dtype).view(y.shape) for dy, y in zip(self.gradients, self.results, strict=True)]
        (exact,) = torch.autograd.grad(self.results, (self.first,), given, retain_graph=True)
        return forward, error_of((self.problem.gradient_part or part)(backward()[0]), exact)


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the root mean square of the exact values. Raises ValueError for another shape."""
    if found.shape != exact.shape:
        raise ValueError(f"the result has shape {tuple(found.shape)}; expected {tuple(exact.shape)}")
    exact = exact.detach().double()
    size = exact.square().mean().sqrt().clamp_min(1e-30)
    return float((found.detach().double() - exact).abs().max() / size)


def as_tuple(results: Results) -> tuple[Tensor, ...]:
    """One result or several, as several."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")
