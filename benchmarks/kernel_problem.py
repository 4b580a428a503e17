"""What a kernel benchmark times: a problem with its contestants, its cost, and a part small enough for float64.

A case is a function of the operation's sizes, registered by `@cases`; it makes the inputs once, and every contestant
works on the same ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trine.kernels.hardware import device_name
from trine.kernels.last_program import LAST_PROGRAM
from trine.kernels.verified import is_verified

Sizes = Mapping[str, int | float | str]
Results = Tensor | tuple[Tensor, ...]
Forward = Callable[[], Results]


@dataclass(frozen=True)
class Cost:
    """What a pass has to do at least: arithmetic operations, and bytes read or written once."""

    flops: float = 0.0
    bytes: float = 0.0


def whole(x: Tensor) -> Tensor:
    """All of it."""
    return x


@dataclass(frozen=True)
class Problem:
    """One shape of one operation.

    `ours` and `peers` run forward and return the result (or several); the backward is that of `leaves` (none: the
    operation has no backward). `plain` is the reference formula in the same dtype: the peer where there is no other,
    as on a CPU. Peers are tried: one that does not support the problem is left out and named. `variants` are other
    kernels of ours for the same, which get rows of their own.

    Errors are measured on a part: `exact`, called with `cut` in float64, gives `part` of each result, and its gradient
    for `cut[0]` is `gradient_part` (default `part`) of that for `leaves[0]`. With `in_place` every call changes its own
    copy of the inputs, and what is checked is the first. `dtype`: where it is not the run's.
    """

    ours: Forward
    plain: Forward
    forward: Cost
    cut: tuple[Tensor, ...]
    exact: Callable[..., Results]
    peers: Mapping[str, Forward] = field(default_factory=dict)
    variants: Mapping[str, Forward] = field(default_factory=dict)
    leaves: tuple[Tensor, ...] = ()
    backward: Cost | None = None
    part: Callable[[Tensor], Tensor] = whole
    gradient_part: Callable[[Tensor], Tensor] | None = None
    in_place: bool = False
    dtype: torch.dtype | None = None


class Inputs:
    """Makes random tensors of one dtype on one device. Never zeros: they hide errors and run faster."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """A leaf of normal numbers."""
        x = torch.randn(shape, device=self.device, generator=self.generator).mul_(scale)
        return x.to(dtype or self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """From 0 to below `high`."""
        return torch.randint(high, shape, device=self.device, generator=self.generator, dtype=dtype)


Build = Callable[..., Problem]


@dataclass(frozen=True)
class Case:
    """One line of the benchmark before it has a dtype and a device."""

    operation: str
    sizes: Sizes
    build: Build
    quick: bool
    on_gpu: bool

    @property
    def shape(self) -> str:
        """`N8192 C4096`; words are shown as they are."""
        return " ".join(size if isinstance(size, str) else f"{name}{size}" for name, size in self.sizes.items())

    def problem(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """Make the inputs and contestants."""
        return self.build(Inputs(device, dtype), **self.sizes)


CASES: list[Case] = []
_MODULES = (
    "kernel_cases",
    "kernel_cases_training",
    "kernel_cases_vocabulary",
    "kernel_cases_rows",
    "kernel_cases_inference",
    "kernel_cases_quantized",
)


def all_cases() -> list[Case]:
    """Every case, in order of importance."""
    for name in _MODULES:
        importlib.import_module(f"trine.benchmarks.{name}")
    return CASES


def cases(operation: str, *, gpu: Sequence[Sizes], cpu: Sequence[Sizes]) -> Callable[[Build], Build]:
    """Register a case function for the sizes timed on a GPU and on a CPU; the first of each are the quick ones."""

    def register(build: Build) -> Build:
        for on_gpu, many in ((True, gpu), (False, cpu)):
            CASES.extend(Case(operation, sizes, build, place == 0, on_gpu) for place, sizes in enumerate(many))
        return build

    return register


def merged_otherwise(new: Inputs, ours: Forward) -> dict[str, Forward]:
    """A variant of split work: in two launches where its last program merges the parts, or the other way round."""
    if not new.on_gpu or torch.version.hip is not None:
        return {}
    in_one = is_verified(LAST_PROGRAM.operation, device_name(new.device))

    def otherwise() -> Results:
        with LAST_PROGRAM.force(not in_one):
            return ours()

    return {"two launches" if in_one else "one launch": otherwise}


def liger(name: str, *arguments: Any, **options: Any) -> Iterator[tuple[str, Forward]]:
    """A function of Liger-Kernel as a peer, where that is installed and has it."""
    try:
        functions = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return
    function = getattr(functions, name, None)
    if function is not None:
        yield "liger", lambda: function(*arguments, **options)
