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
    with torch.cuda.device(device):
        kernel[grid](
            **arguments,
            **config.blocks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **{"enable_fp_fusion": True, **(options or {})},
        )


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
