"""Calling a registered operation without the dispatcher, where nobody looks on.

`torch.library` costs the host 45 us for a call that autograd records and 19 us for any other, nearly all of it in
Python; a training step of 8 layers makes 85 of them, which was a quarter of its host time. So `run` calls the
registered function itself (16 and 6 us), and where gradients are recorded, an autograd function made of it and the
registered backward. The same code computes the same bits.

The dispatcher is asked as before where somebody has to see the operation: under torch.compile, export and tracing, in
modes (fake tensors, FLOP counters), in transforms (vmap, grad), for subclasses of Tensor and tensors without memory.
Also where an argument is not just what the function declares, for it converts them, and where gradients would be
recorded of an operation without a backward, which it refuses in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_TENSORS = frozenset({Tensor, Parameter})


@dataclass(frozen=True, slots=True)
class _Plain:
    """A registered function, the classes that each of its arguments may have, and its autograd function, if any."""

    function: Callable[..., Any]
    classes: tuple[frozenset[type], ...]
    recorded: Callable[..., Any] | None

    def takes(self, arguments: tuple[Any, ...]) -> bool:
        """Whether the function can be called with these as they are."""
        if len(arguments) != len(self.classes):
            return False
        for value, classes in zip(arguments, self.classes, strict=True):
            kind = value.__class__
            if kind not in classes or (kind in _TENSORS and value.is_meta):
                return False
            if kind is list and not all(item.__class__ in _ITEMS for item in value):
                return False
        return True


# What a list may hold. A list of tensors without memory is not told apart: none of the operations is given one.
_ITEMS = _TENSORS | {bool, float}
_known: dict[CustomOpDef, _Plain] = {}


def run(operation: CustomOpDef, *arguments: Any) -> Any:
    """What `operation(*arguments)` returns, with less work for the host.

    It may change only arguments that autograd never sees, such as a cache.
    """
    if torch.compiler.is_compiling():
        return operation(*arguments)
    plain = _known.get(operation) or _look_at(operation)
    if _watched() or not plain.takes(arguments):
        return operation(*arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return (plain.recorded or operation)(*arguments)
    # Below autograd, as behind the dispatcher: what the function calls is not asked whether it is differentiated.
    with torch._C._AutoDispatchBelowAutograd():
        return plain.function(*arguments)


def _watched() -> bool:
    return is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def _look_at(operation: CustomOpDef) -> _Plain:
    """Take a registration apart, once."""
    function: Any = operation._init_fn
    hints = get_type_hints(function)
    del hints["return"]
    recorded = None if operation._backward_fn is None else _autograd_function(operation)
    _known[operation] = _Plain(function, tuple(_classes(hint) for hint in hints.values()), recorded)
    return _known[operation]


def _classes(hint: Any) -> frozenset[type]:
    """The classes that an annotation lets through."""
    if get_origin(hint) in (UnionType, type(Tensor | None)):
        return frozenset().union(*(_classes(part) for part in get_args(hint)))
    if get_origin(hint) in (list, Sequence):
        return frozenset({list})
    return _TENSORS if hint is Tensor else frozenset({hint})


def _autograd_function(operation: CustomOpDef) -> Callable[..., Any]:
    function: Any = operation._init_fn
    set_up: Any = operation._setup_context_fn
    backward: Any = operation._backward_fn

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = function(*arguments)
            set_up(ctx, arguments, result)
        return result

    # Profiles show it by this name.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    recorded: Any = type(operation._qualname, (torch.autograd.Function,), members)
    return recorded.apply  # type: ignore[no-any-return]
