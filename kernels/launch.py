"""Launching Triton kernels, and recording what would be launched.

Every kernel of this room is started by `launch`. Within `recording` nothing runs: the launches are collected, with
their arguments and configuration, which is what ahead-of-time compiling compiles. So what is checked without a GPU is
what a GPU will run, and no list of kernels has to be kept by hand.

The Triton interpreter gets bfloat16 wrong in two ways: arithmetic on it acts on the bit patterns, and storing fp32 as
bf16 truncates (as fp8 too). So kernels convert what they load to fp32 at once, multiply by `language.dot`, and
launchers allocate results with `result_dtype` and hand them out through `rounded`: in the interpreter results are
stored in fp32 and rounded by torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.kernels.hardware import INTERPRETING
from trine.kernels.target import Target, pretend
from trine.kernels.tuning import Config

# What the interpreter truncates to, where a GPU rounds to nearest.
_TRUNCATED = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its grid, its arguments by name (constexprs included) and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: Config
    options: Mapping[str, Any]


_recorder: ContextVar[list[Launch] | None] = ContextVar("recorder", default=None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: Config,
    arguments: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Start `kernel` on the device of its tensors; does nothing where the grid is empty.

    `arguments`: by name, tensors, numbers and constexprs; `config.blocks` is added to them. `options` are passed on to
    the compiler (such as `maxnreg`).
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Launch(kernel, grid, {**arguments, **config.blocks}, config, options or {}))
        return
    if 0 in grid:
        return
    if INTERPRETING:
        kernel[grid](**arguments, **config.blocks)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.index == torch.cuda.current_device():
        _start(kernel, grid, config, {**arguments, **config.blocks}, options or {}, device.index)
    else:
        with torch.cuda.device(device):
            _start(kernel, grid, config, {**arguments, **config.blocks}, options or {}, device.index)


# By what launches have in common, what was compiled for the first of them. By a kernel's id, the kernel (kept, so that
# no other gets the id) and its arguments in order: the name of each, and whether it is a constexpr.
_compiled: dict[tuple[Any, ...], Any] = {}
_parameters: dict[int, tuple[Any, list[tuple[str, bool]]]] = {}
_MISSING = object()


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    config: Config,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    device: int,
) -> None:
    """Start `kernel` on the current device.

    Triton derives at every launch what it has to compile, which costs the host several times what starting it does. So
    what it compiled is kept here and started directly the next time.
    """
    if id(kernel) not in _parameters:
        _parameters[id(kernel)] = kernel, [(parameter.name, parameter.is_constexpr) for parameter in kernel.params]
    values: list[Any] = []
    key = [id(kernel), device, config.num_warps, config.num_stages, *options.items()]
    comparable = _compare(_parameters[id(kernel)][1], arguments, key, values)
    compiled = _compiled.get(tuple(key)) if comparable else None
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*values)
        return
    compiled = kernel[grid](
        **arguments,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **{"enable_fp_fusion": True, **options},
    )
    if comparable:
        _compiled[tuple(key)] = compiled


def _compare(
    parameters: list[tuple[str, bool]], arguments: Mapping[str, Any], key: list[Any], values: list[Any]
) -> bool:
    """Add to `key` what launches that run the same machine code have in common, and the arguments in order to `values`.

    At least as fine as Triton divides them: it compiles for values of constexprs; for dtypes and alignment of tensors;
    for integers that are 1, that 16 divides, or that need more bits; and for dtype, block and layout of descriptors of
    memory, which name their tensor and its shape at every launch anew. False where an argument is not compared: what is
    missing since it has a default, other objects, and on AMD, where the size of memory counts, tensors and descriptors.
    """
    is_amd = torch.version.hip is not None
    for name, constant in parameters:
        value = arguments.get(name, _MISSING)
        if value is _MISSING:
            return False
        kind = value.__class__
        values.append(value)
        # Two entries for each argument: its kind, and what counts of it.
        if constant:
            key += kind, value
        elif kind is int:
            key += kind, (value == 1, value % 16 == 0, value.bit_length() // 32)
        elif isinstance(value, Tensor):
            if is_amd:
                return False
            key += value.dtype, value.data_ptr() % 16
        elif value is None or kind is bool or kind is float:
            key += kind, None
        elif kind.__name__ == "TensorDescriptor" and not is_amd:
            # Plain Triton's and Gluon's; the latter has a layout.
            key += kind, (value.base.dtype, *value.block_shape, getattr(value, "layout", None), value.padding)
        else:
            return False
    return True


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches of this block instead of running them, as they would be on `target`.

    Call launchers on tensors of the "meta" device, which have shapes and dtypes but no memory.
    """
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        with pretend(target):
            yield launches
    finally:
        _recorder.reset(token)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores its results in: `dtype`, but fp32 for bf16 and fp8 in the interpreter."""
    return torch.float32 if dtype in _TRUNCATED and INTERPRETING else dtype


def rounded(result: Tensor, dtype: torch.dtype) -> Tensor:
    """A result stored in `result_dtype(dtype)`, in `dtype`."""
    return result if result.dtype == dtype else result.to(dtype)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size` (1 for 0): Triton's blocks are powers of two."""
    return 1 << max(0, size - 1).bit_length()


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
