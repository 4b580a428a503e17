"""Kernels in Triton's interpreter, on the CPU: run with TRITON_INTERPRET=1, in a process of their own.

The rule of every comparison: the error against float64 is at most twice that of the plain computation in the same
dtype, plus a floor of rounding. The largest ratio of each operation is printed at the end.
"""

from __future__ import annotations

import runpy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trine.kernels.hardware import INTERPRETING

collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

# Floor of the bound in roundings (half a unit in the last place) of the largest exact value. In fp32 the plain
# computation's own error is down to luck, so more are allowed.
FLOOR_ROUNDINGS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases in fp16, whose kernels are those of bf16, are slow tests: a third of the time of all."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and isinstance(item, pytest.Function):
            callspec = getattr(item, "callspec", None)
            if callspec is not None and torch.float16 in callspec.params.values():
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _lighter_interpreter() -> Iterator[None]:
    """All tests of this folder, in a third of the time (see `lighter.py`)."""
    with runpy.run_path(str(Path(__file__).with_name("lighter.py")))["lighter_interpreter"]():
        yield


class Compare:
    """Checks results and gradients against float64 by the rule above, and keeps the ratios."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node

    def values(self, operation: str, found: Tensor, plain: Tensor, exact: Tensor) -> None:
        """`found` (ours) and `plain` (the same dtype, plain torch) against `exact` (float64)."""
        assert found.shape == exact.shape, f"{operation}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
        assert found.dtype == plain.dtype, f"{operation}: {found.dtype}, expected {plain.dtype}"
        if not exact.numel():
            return
        exact = exact.detach().double()
        assert torch.isfinite(found.detach()).logical_or(~torch.isfinite(exact)).all(), f"{operation}: not finite"
        finite = torch.isfinite(exact)
        assert torch.equal(found.detach().double()[~finite], exact[~finite]), f"{operation}: infinities differ"
        ours, theirs = (_error(x.detach().double(), exact, finite) for x in (found, plain))
        largest = float(exact[finite].abs().max()) if bool(finite.any()) else 0.0
        floor = FLOOR_ROUNDINGS[found.dtype] * torch.finfo(found.dtype).eps / 2 * largest + 1e-30
        ratio = ours / (theirs + floor / 2)
        self._node.user_properties.append(("ratio", [operation, ratio]))
        assert ratio <= 2, f"{operation}: error {ours:.3e}, plain {theirs:.3e}, floor {floor:.3e}"

    def gradients(
        self,
        operation: str,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        plain: Callable[..., Tensor | tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        exact: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    ) -> None:
        """Results and the gradients of every floating-point input, for random gradients of the results.

        `plain` computes the same in torch; `exact` (default `plain`) is called with float64 inputs.
        """
        sets = []
        for call, double in ((function, False), (plain, False), (exact or plain, True)):
            leaves = [_leaf(x, double) for x in inputs]
            results = call(*leaves)
            results = (results,) if isinstance(results, Tensor) else results
            sets.append((leaves, results))
        generator = torch.Generator().manual_seed(99)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in sets[0][1]]
        weights = [w.to(x.dtype).double() for w, x in zip(weights, sets[0][1], strict=True)]
        for leaves, results in sets:
            pairs = [(x, w) for x, w in zip(results, weights, strict=True) if x.requires_grad]
            torch.autograd.backward([x for x, _ in pairs], [w.to(x.dtype) for x, w in pairs])
            assert any(x.grad is not None for x in leaves)
        for place, values in enumerate(zip(*(results for _, results in sets), strict=True)):
            self.values(f"{operation} forward", *values)
            assert values[0].requires_grad == values[1].requires_grad, f"result {place} of {operation}"
        for place, (mine, theirs, double) in enumerate(zip(*(leaves for leaves, _ in sets), strict=True)):
            if double.grad is None:
                continue
            assert mine.grad is not None, f"{operation}: input {place} got no gradient"
            assert theirs.grad is not None
            self.values(f"{operation} backward", mine.grad, theirs.grad, double.grad)


def _leaf(x: Tensor, double: bool) -> Tensor:
    if not x.is_floating_point():
        return x
    return (x.detach().double() if double else x.detach().clone()).requires_grad_()


def _error(x: Tensor, exact: Tensor, finite: Tensor) -> float:
    return float((x - exact)[finite].abs().max()) if bool(finite.any()) else 0.0


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Compare:
    """The comparison of this test's results."""
    return Compare(request.node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the cases and the largest ratio of every operation."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "ratio":
                ratios[value[0]].append(value[1])
    if not ratios:
        return
    terminalreporter.section("error against float64, over the plain computation's (at most 2)")
    for operation, values in sorted(ratios.items()):
        terminalreporter.write_line(f"{max(values):6.2f}  {len(values):5d} comparisons  {operation}")
