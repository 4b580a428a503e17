"""Launch configurations: chosen by a pure function of shape, dtype and target, or looked up in measured ones.

Nothing is tuned while a program runs. `trine bench kernels --tune` measures candidates on a GPU and writes
`tuned/<gpu>.json`; at run time a shape takes the entry of the nearest measured shape (same operation, dtype and GPU),
and the operation's own rule where there is none. An entry counts only where its configuration is among the candidates
for the shape at hand, so that a block size which fits one width is never used for another.

A file holds {"gpu", "entries": [{"operation", "dtype", "shape": {name: size}, "config": {"num_warps", "num_stages",
block name: size}, "microseconds", "rule_microseconds", "versions": {"torch", "triton"}}]}: how long the best took, and
what the rule chooses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

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
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Tunable:
    """A kernel's choice of configuration: `rule` decides, `candidates` is what tuning tries beside it."""

    operation: str
    rule: Rule
    candidates: Callable[[Shape, torch.dtype, Target], list[Config]]

    def pick(self, dtype: torch.dtype, target: Target, **shape: int) -> Config:
        """The configuration for a shape, given as named sizes such as `N=4096, C=1024`."""
        if not (_observers or _forced):
            key = (self.operation, dtype, target, *shape.items())
            if key not in _picked:
                _picked[key] = _pick(Question(self, tuple(sorted(shape.items())), dtype, target))
            return _picked[key]
        sizes = tuple(sorted(shape.items()))
        question = Question(self, sizes, dtype, target)
        for asked in _observers:
            asked.append(question)
        forced = _forced.get((self.operation, sizes)) or _forced.get((self.operation, None))
        return forced or _pick(question)

    def choices(self, shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
        """What tuning tries and what an entry may hold: the rule's choice first, then the other candidates."""
        first = self.rule(shape, dtype, target)
        return [first, *(config for config in self.candidates(shape, dtype, target) if config != first)]


@dataclass(frozen=True)
class Question:
    """One call of `pick`."""

    tunable: Tunable
    sizes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    target: Target


# Not context variables: on a GPU the backward runs in threads of autograd's own, which would not see those.
_forced: dict[tuple[str, tuple[tuple[str, int], ...] | None], Config] = {}
_observers: list[list[Question]] = []
# Answers by what was asked, in the order it was asked: most launches ask again what a step before has asked.
_picked: dict[tuple[Any, ...], Config] = {}


@lru_cache(maxsize=4096)
def _pick(question: Question) -> Config:
    shape, tunable = dict(question.sizes), question.tunable
    measured = [entry for entry in tuned_entries(question.target.gpu) if entry["operation"] == tunable.operation]
    if not measured:
        return tunable.rule(shape, question.dtype, question.target)
    choices = tunable.choices(shape, question.dtype, question.target)
    return nearest(measured, tunable.operation, shape, question.dtype, choices) or choices[0]


@contextmanager
def force(configs: Mapping[str, Config], *, shape: Shape | None = None) -> Iterator[None]:
    """Within this block the named operations take these configurations (for `shape` only, where given), in all threads.

    For tuning and tests.
    """
    sizes = None if shape is None else tuple(sorted(shape.items()))
    before = dict(_forced)
    _forced.update({(name, sizes): config for name, config in configs.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def observing() -> Iterator[list[Question]]:
    """Collect every call of `pick` within this block, of all threads."""
    asked: list[Question] = []
    _observers.append(asked)
    try:
        yield asked
    finally:
        _observers[:] = [other for other in _observers if other is not asked]


def tuned_file(gpu: str) -> Path:
    """Where measured configurations of a GPU are kept: `NVIDIA H200` is `tuned/nvidia-h200.json`."""
    return TUNED / (gpu.lower().replace(" ", "-").replace("/", "-") + ".json")


@lru_cache(maxsize=8)
def tuned_entries(gpu: str) -> tuple[Entry, ...]:
    """The measured entries for a GPU; empty where none were measured."""
    path = tuned_file(gpu)
    if not gpu or not path.is_file():
        return ()
    return tuple(json.loads(path.read_text(encoding="utf-8"))["entries"])


def write_tuned(gpu: str, entries: Sequence[Entry]) -> Path:
    """Add measured entries to a GPU's file, in place of those of the same operation, dtype and shape; returns its path.

    They are used from then on, by this process too. Raises ValueError without the name of a GPU.
    """
    if not gpu:
        raise ValueError("gpu is empty; configurations are kept under the product name of the GPU they were found on")

    def key(entry: Entry) -> tuple[str, str, list[tuple[str, int]]]:
        return entry["operation"], entry["dtype"], sorted(entry["shape"].items())

    new = {str(key(entry)): entry for entry in entries}
    kept = [entry for entry in tuned_entries(gpu) if str(key(entry)) not in new]
    path = tuned_file(gpu)
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in sorted([*kept, *new.values()], key=key))
    path.write_text(f'{{"gpu": {json.dumps(gpu)}, "entries": [\n{lines}\n]}}\n', encoding="utf-8")
    forget()
    return path


def forget() -> None:
    """Read the files of measured configurations anew."""
    tuned_entries.cache_clear()
    _pick.cache_clear()
    _picked.clear()


def nearest(
    entries: Sequence[Entry], operation: str, shape: Shape, dtype: torch.dtype, choices: Sequence[Config] | None = None
) -> Config | None:
    """The configuration measured at the nearest shape (sizes compared by their logarithms), or None.

    Sizes that a kernel's correctness depends on (names beginning with `exact_`) must be equal, and the configuration
    must be one of `choices` where those are given.
    """
    name = str(dtype).removeprefix("torch.")
    best: tuple[float, Config] | None = None
    for entry in entries:
        sizes: Mapping[str, int] = entry["shape"]
        if entry["operation"] != operation or entry["dtype"] != name or sizes.keys() != shape.keys():
            continue
        if any(key.startswith("exact_") and sizes[key] != shape[key] for key in shape):
            continue
        config = Config.from_json(entry["config"])
        if choices is not None and config not in choices:
            continue
        distance = sum(abs(math.log2((1 + sizes[key]) / (1 + shape[key]))) for key in shape)
        if best is None or distance < best[0]:
            best = distance, config
    return None if best is None else best[1]
