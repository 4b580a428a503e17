"""Where a converted checkpoint goes: a new folder that appears whole or not at all, and the dtype of its numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from trine.engine.errors import StorageError, UsageError
from trine.engine.log import format_bytes, progress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Of the files of an imported folder; importing takes so much memory.
SHARD_BYTES = 2**30


def choose_dtype(name: str) -> torch.dtype | None:
    """The dtype that --dtype names; None for auto. Raises `UsageError`."""
    if name == "auto":
        return None
    dtype = DTYPES.get(SHORT_NAMES.get(name, name))
    if dtype is None:
        raise UsageError(f"--dtype is {name!r}; it must be auto, {', '.join(DTYPES)} ({', '.join(SHORT_NAMES)})")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json calls it."""
    return str(dtype).removeprefix("torch.")


def check_new(out: Path) -> None:
    """Raises `UsageError` where `out` is there already."""
    if out.exists():
        raise UsageError(f"{out} exists already; give --out a folder that does not")


def check_room(out: Path, num_bytes: int) -> None:
    """Make the folder around `out`. Raises `StorageError` where so many bytes do not fit there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise StorageError(
            f"{out.parent} has {format_bytes(free)} free, the result needs {format_bytes(num_bytes)}; make room"
        )


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A hidden folder beside `out` for so many bytes; it becomes `out` at the end, and is gone if anything fails.

    Raises `StorageError` where they do not fit, or the disk fails. What a killed run left is removed by the next one.
    """
    aside = out.parent / f".writing-{out.name}"
    try:
        if aside.exists():
            shutil.rmtree(aside)
        check_room(out, num_bytes)
        aside.mkdir()
        yield aside
        for path in (*aside.rglob("*"), aside):
            _flush(path)
        os.rename(aside, out)
        _flush(out.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {out} ({error}); make room there, or give another --out") from None
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def shown(make: Callable[[str], Tensor], total: int, what: str) -> Callable[[str], Tensor]:
    """`make`, with progress shown over so many calls."""
    ticks = progress(range(total), total=total, what=what)
    next(ticks, None)

    def call(name: str) -> Tensor:
        tensor = make(name)
        next(ticks, None)
        return tensor

    return call


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
