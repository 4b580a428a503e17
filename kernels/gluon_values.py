"""What the Gluon simulator computes with: numbers, tensors in registers, pointers, shared memory, barriers, wgmma."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Scalar(int):
    """A number of a kernel: an int that stays one under arithmetic and knows `.to`."""

    def to(self, dtype: Any) -> Any:
        return self


def _arithmetic(name: str) -> Callable[..., Any]:
    def operate(self: Scalar, *other: Any) -> Any:
        result = getattr(int, name)(self, *other)
        return Scalar(result) if isinstance(result, int) and not isinstance(result, bool) else result

    return operate


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _side in ("", "r"):
        setattr(Scalar, f"__{_side}{_name}__", _arithmetic(f"__{_side}{_name}__"))


class Value:
    """A tensor in registers, in fp32 (rounded where its dtype is narrower), with its layout."""

    def __init__(self, data: Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def to(self, dtype: torch.dtype) -> Value:
        half = dtype in (torch.bfloat16, torch.float16)
        return Value(self.data.to(dtype).float() if half else self.data.to(dtype), self.layout)

    def __getitem__(self, key: Any) -> Value:
        return Value(self.data[key], self.layout)

    def __neg__(self) -> Value:
        return Value(-self.data, self.layout)

    def apply(self, operate: Callable[..., Tensor], other: Any) -> Value:
        data = other.data if isinstance(other, Value) else other
        wide = other if isinstance(other, Value) and other.data.dim() > self.data.dim() else self
        return Value(operate(self.data, data), wide.layout)


for _name in ("add", "sub", "mul", "truediv", "and", "lt", "le", "gt", "ge", "eq", "radd", "rsub", "rmul", "rtruediv"):
    setattr(Value, f"__{_name}__", lambda self, other, _name=_name: self.apply(getattr(Tensor, f"__{_name}__"), other))


class Pointer:
    """Somewhere in a tensor's memory: one place, or one for each number of a tensor."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset

    @staticmethod
    def to_tensor(x: Tensor) -> Pointer:
        count = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(x.as_strided((count,), (1,), 0), x.storage_offset())

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, steps + self.offset if isinstance(steps, Value) else self.offset + steps)


class Barrier:
    """An mbarrier: a phase completes when its arrivals and bytes are in, and the next begins."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.completed = 0

    def arrive(self, arrivals: int, num_bytes: int = 0) -> None:
        assert self.count, "a barrier is used before it is initialised"
        assert arrivals <= self.pending, "more arrivals than a phase has"
        self.pending -= arrivals
        self.bytes += num_bytes
        self.complete()

    def complete(self, num_bytes: int = 0) -> None:
        self.bytes -= num_bytes
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.completed = self.count, self.completed + 1

    def passed(self, parity: int) -> bool:
        return self.completed & 1 != parity


class Shared:
    """Shared memory, or a view of it. Barriers are its contents where it holds barriers. `wrote` is told of stores."""

    def __init__(self, data: Any, dtype: Any, wrote: Callable[[], None]) -> None:
        self.data, self.dtype, self.wrote = data, dtype, wrote

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def index(self, place: int) -> Any:
        return self.data[place] if isinstance(self.data, list) else self._view(self.data[place])

    def reshape(self, shape: list[int]) -> Shared:
        return self._view(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(self.data.permute(order))

    def store(self, x: Value) -> None:
        assert self.data.shape == x.data.shape
        self.data.copy_(x.data)
        self.wrote()

    def _view(self, data: Tensor) -> Shared:
        return Shared(data, self.dtype, self.wrote)


class Product(Value):
    """An issued wgmma: no number until it has been waited for, but sums that the next one goes on from."""

    def __init__(self, sums: Tensor, layout: Any, operands: list[tuple[Tensor, Tensor]]) -> None:
        self.sums, self.layout, self.operands, self.done = sums, layout, operands, False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        assert self.done, "a product is used before it was waited for"
        return self.sums

    def retire(self) -> None:
        for view, issued in self.operands:
            assert torch.equal(view, issued), "shared memory changed, or was not loaded, while a product read it"
        self.done = True
