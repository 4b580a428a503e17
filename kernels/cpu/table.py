"""Which path multiplies rows by a weight on a CPU: what was measured (`measured.py`), and the choice that follows.

A kind is what is multiplied by what ("4 bits by bfloat16"); a path is one way to do it:

    loops       this folder's compiled loops
    tiles       compiled loops that multiply in the CPU's matrix tiles (AMX), rows of bf16
    slabs       the same, of some outputs dequantized for all rows into the cache
    planes      compiled loops that multiply codes as whole numbers by several rows, rounded to as many bits as count
    panels      compiled loops that decode float8 codes to bf16 for all rows, some outputs after the other
    pieces      some outputs of the weight after the other dequantized into a buffer by compiled loops, then torch
    torch       torch's product: of the plain weight, or of one dequantized by torch piece by piece
    packed      oneDNN's product with a weight in its own layout
    int8pack    torch's product of bf16 rows with int8 weights, one scale a row
    int4pack    torch's product of bf16 rows with 4-bit weights in its own layout

What needs Numba is left out where Numba is missing (`compiled.py` logs why), and what multiplies bytes or bf16 where a
CPU has no instruction for that (or matrix tiles, which are faster). A kind that was not measured on one class of CPUs
goes by the figures of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from trine.kernels.cpu.codes import has_tiles
from trine.kernels.cpu.compiled import available
from trine.kernels.cpu.measured import ROWS, SPEEDS, STEP_ROWS

COMPILED = ("loops", "tiles", "slabs", "planes", "panels", "pieces")
# (kind or None for all, path) of what multiplies bytes.
_OF_BYTES = ((None, "planes"), ("int8 by int8", "loops"))
# What there is for packed weights of 4 and 8 bits in the layouts "lanes" and "rows" (`quantized/packing.py`), and for
# plain weights, int8 ones among them.
LANES_PATHS = ("loops", "tiles", "slabs", "planes", "pieces")
ROWS_PATHS = ("torch", "int4pack", "int8pack")
PLAIN_PATHS = ("loops", "torch", "int8pack")
# Of float8 codes; "torch" where they are kept as bf16 numbers.
FLOAT8_PATHS = ("loops", "panels", "pieces", "torch")
KINDS = tuple(dict.fromkeys(kind for kinds in SPEEDS.values() for kind in kinds))
_REASONS = {
    "loops": "read the weight once, as it is kept",
    "tiles": "decoded once for 64 rows, multiplied in AMX tiles",
    "slabs": "dequantized once for all rows, multiplied in AMX tiles",
    "planes": "codes by whole numbers, taken apart once for several rows",
    "panels": "decoded once for all rows, multiplied as bf16",
    "pieces": "dequantized once for all rows, into the cache",
    "torch": "its product outruns what reading less saves",
    "packed": "oneDNN's own layout saves a copy a call",
    "int8pack": "reads int8, rounds scales to bf16",
    "int4pack": "reads 4 bits, rounds scales to bf16",
}


@dataclass(frozen=True, slots=True)
class Range:
    """The path of a kind for first <= rows <= last (None: and more), its speed there against plain bf16, and why."""

    kind: str
    first: int
    last: int | None
    path: str
    speeds: tuple[float, ...]
    reason: str


@lru_cache(maxsize=1)
def cpu_class() -> str:
    """Which measurements stand for this CPU: those with or without tiles for matrix products."""
    return "AMX" if has_tiles() else "AVX512"


@lru_cache(maxsize=1)
def multiplies_bytes() -> bool:
    """Whether this CPU sums four products of bytes in one instruction (vpdpbusd on 512 bits)."""
    return torch.cpu._is_vnni_supported()


@lru_cache(maxsize=1)
def multiplies_bfloats() -> bool:
    """Whether this CPU looks up bytes and multiplies bf16 in vectors of 512 bits, and has no tiles for it."""
    if cpu_class() != "AVX512" or not available():
        return False
    from trine.kernels.cpu.float8_loops import DOTS

    return bool(DOTS)


def choose(kind: str, rows: int, among: tuple[str, ...] | None = None) -> str:
    """The fastest path for `rows` rows of one of `KINDS`, of those that can be used here (and are in `among`)."""
    return _fastest(cpu_class(), kind, rows, among, available(), multiplies_bytes(), multiplies_bfloats())


@lru_cache(maxsize=4096)
def _fastest(
    cpu: str, kind: str, rows: int, among: tuple[str, ...] | None, compiled: bool, of_bytes: bool, of_bfloats: bool
) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known are {', '.join(KINDS)}")
    paths = {
        path: speeds
        for path, speeds in _speeds(cpu, kind).items()
        if (among is None or path in among)
        and (compiled or path not in COMPILED)
        and (of_bytes or ((None, path) not in _OF_BYTES and (kind, path) not in _OF_BYTES))
        and (of_bfloats or path != "panels")
    }
    place = measured_place(rows)
    return max(paths, key=lambda path: paths[path][place])


def _speeds(cpu: str, kind: str) -> dict[str, tuple[float, ...]]:
    return next(SPEEDS[name][kind] for name in (cpu, *SPEEDS) if kind in SPEEDS[name])


def step_rows(weights: str) -> int:
    """Up to how many rows a decoding step of weights of a kind (`projection.NAMES`) is faster in compiled loops."""
    return STEP_ROWS[cpu_class()][weights]


def usable(kind: str) -> tuple[str, ...]:
    """The paths that the functions of this library choose among for a kind."""
    if "bits" in kind:
        return LANES_PATHS if available() else ROWS_PATHS
    if "float8" in kind:
        return FLOAT8_PATHS
    return PLAIN_PATHS


def measured_place(rows: int) -> int:
    """The place in `ROWS` that stands for a number of rows: the next larger one that was measured, or the largest."""
    return next((place for place, number in enumerate(ROWS) if number >= rows), len(ROWS) - 1)


def ranges(kind: str) -> tuple[Range, ...]:
    """What is chosen for a kind on this CPU, from one row on."""
    found: list[Range] = []
    for place, number in enumerate(ROWS):
        path = choose(kind, number, usable(kind))
        speed = _speeds(cpu_class(), kind)[path][place]
        if found and found[-1].path == path:
            before = found.pop()
            found.append(Range(kind, before.first, number, path, (*before.speeds, speed), before.reason))
        else:
            first = 1 if place == 0 else ROWS[place - 1] + 1
            found.append(Range(kind, first, number, path, (speed,), _REASONS[path]))
    last = found.pop()
    return (*found, Range(kind, last.first, None, last.path, last.speeds, last.reason))
