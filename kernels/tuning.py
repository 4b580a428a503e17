"""Launch configurations: chosen by a pure function of shape, dtype and target, or looked up in measured ones.

Nothing is tuned while a program runs. `trine bench kernels --tune` measures candidates on a GPU and writes
`tuned/<gpu>.json`; at run time a shape takes the entry of the nearest measured shape (same operation, dtype and GPU),
and the operation's own rule where there is none.

A file holds {"gpu", "versions", "entries": [{"operation", "dtype", "shape": {name: size}, "config": {"num_warps",
"num_stages", block name: size}}]}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from trine.kernels.target import Target

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: its block sizes (constexpr arguments by name), warps and pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def as_json(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.blocks}

    @staticmethod
    def from_json(values: Mapping[str, int]) -> Config:
        blocks = {name: size for name, size in values.items() if name not in ("num_warps", "num_stages")}
        return Config(blocks, values["num_warps"], values["num_stages"])


Shape = Mapping[str, int]
Rule = Callable[[Shape, torch.dtype, Target], Config]
_forced: ContextVar[Mapping[str, Config]] = ContextVar("forced configurations", default={})  # noqa: B039


@dataclass(frozen=True)
class Tunable:
    """A kernel's choice of configuration: `rule` decides, `candidates` is what tuning tries beside it."""

    operation: str
    rule: Rule
    candidates: Callable[[Shape, torch.dtype, Target], list[Config]]

    def pick(self, dtype: torch.dtype, target: Target, **shape: int) -> Config:
        """The configuration for a shape, given as named sizes such as `N=4096, C=1024`."""
        forced = _forced.get().get(self.operation)
        if forced is not None:
            return forced
        return _pick(self, tuple(sorted(shape.items())), dtype, target)


@lru_cache(maxsize=4096)
def _pick(tunable: Tunable, shape: tuple[tuple[str, int], ...], dtype: torch.dtype, target: Target) -> Config:
    sizes = dict(shape)
    entry = nearest(tuned_entries(target.gpu), tunable.operation, sizes, dtype)
    return tunable.rule(sizes, dtype, target) if entry is None else entry


@contextmanager
def force(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within this block the named operations take these configurations; for tuning and tests."""
    token = _forced.set({**_forced.get(), **configs})
    try:
        yield
    finally:
        _forced.reset(token)


def tuned_file(gpu: str) -> Path:
    """Where measured configurations of a GPU are kept: `NVIDIA H200` is `tuned/nvidia-h200.json`."""
    return TUNED / (gpu.lower().replace(" ", "-").replace("/", "-") + ".json")


@lru_cache(maxsize=8)
def tuned_entries(gpu: str) -> tuple[Mapping[str, object], ...]:
    """The measured entries for a GPU; empty where none were measured."""
    path = tuned_file(gpu)
    if not gpu or not path.is_file():
        return ()
    return tuple(json.loads(path.read_text(encoding="utf-8"))["entries"])


def nearest(
    entries: tuple[Mapping[str, object], ...], operation: str, shape: Shape, dtype: torch.dtype
) -> Config | None:
    """The configuration measured at the nearest shape (sizes compared by their logarithms), or None.

    Sizes that a kernel's correctness depends on (names beginning with `exact_`) must be equal.
    """
    name = str(dtype).removeprefix("torch.")
    best: tuple[float, Mapping[str, int]] | None = None
    for entry in entries:
        sizes = entry["shape"]
        assert isinstance(sizes, Mapping)
        if entry["operation"] != operation or entry["dtype"] != name or sizes.keys() != shape.keys():
            continue
        if any(key.startswith("exact_") and sizes[key] != shape[key] for key in shape):
            continue
        distance = sum(abs(math.log2((1 + sizes[key]) / (1 + shape[key]))) for key in shape)
        if best is None or distance < best[0]:
            config = entry["config"]
            assert isinstance(config, Mapping)
            best = distance, config
    return None if best is None else Config.from_json(best[1])
