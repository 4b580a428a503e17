"""Which path multiplies few rows by a weight on a CPU: what was measured, as data, and the choice that follows.

Speeds are relative to a bf16 product by `torch.nn.functional.linear` of the same shape, which is 1. `compiled` are the
loops of this folder; `torch` what `matvec.py` calls otherwise; `packed` is oneDNN's product with a weight in its own
layout, for those who keep one.
"""

from __future__ import annotations

from dataclasses import dataclass

from trine.kernels.cpu.compiled import available

# By `benchmarks/cpu_decode.py`, medians over several runs on a machine that others used too: good to a tenth for one
# and two rows, to a fifth or so for more.
MEASURED_ON = "one core of a Zen 5 server CPU (AVX512-BF16, VNNI), weights of 1024 x 2816, torch 2.13, numba 0.68"


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of one kind of weight at one number of rows; None where there is no such path."""

    kind: str
    rows: int
    compiled: float
    torch: float
    packed: float | None = None


TABLE = (
    Speeds("bfloat16", 1, compiled=1.6, torch=1.0, packed=1.62),
    Speeds("bfloat16", 2, compiled=1.24, torch=1.0, packed=1.43),
    Speeds("bfloat16", 3, compiled=0.79, torch=1.0, packed=1.5),
    Speeds("bfloat16", 4, compiled=0.79, torch=1.0, packed=1.6),
    Speeds("bfloat16", 8, compiled=0.49, torch=1.0, packed=1.71),
    Speeds("float32", 1, compiled=0.92, torch=0.36, packed=0.73),
    Speeds("float32", 2, compiled=0.79, torch=0.17, packed=0.65),
    Speeds("float32", 3, compiled=0.65, torch=0.16, packed=0.63),
    Speeds("float32", 4, compiled=0.70, torch=0.25, packed=0.65),
    Speeds("float32", 8, compiled=0.44, torch=0.25, packed=0.5),
    # int8 weights with a scale a row: by rows of bf16 (torch: int8pack) and of fp32 (torch: dequantized first).
    Speeds("int8 by bfloat16", 1, compiled=2.7, torch=2.17),
    Speeds("int8 by bfloat16", 2, compiled=2.19, torch=1.87),
    Speeds("int8 by bfloat16", 3, compiled=1.1, torch=1.8),
    Speeds("int8 by bfloat16", 4, compiled=1.0, torch=2.04),
    Speeds("int8 by float32", 1, compiled=2.87, torch=0.24),
    Speeds("int8 by float32", 2, compiled=2.3, torch=0.15),
    Speeds("int8 by float32", 3, compiled=1.15, torch=0.15),
    Speeds("int8 by float32", 4, compiled=1.13, torch=0.18),
    Speeds("int8 by float32", 8, compiled=0.52, torch=0.15),
    # int8 on both sides (torch: _int_mm; packed: qlinear).
    Speeds("int8 by int8", 1, compiled=2.86, torch=2.75, packed=2.13),
    Speeds("int8 by int8", 2, compiled=2.16, torch=1.28, packed=2.08),
    Speeds("int8 by int8", 3, compiled=1.7, torch=1.3, packed=2.5),
    Speeds("int8 by int8", 4, compiled=1.51, torch=1.38, packed=2.51),
    Speeds("int8 by int8", 8, compiled=0.78, torch=1.22, packed=2.16),
)
KINDS = tuple(dict.fromkeys(speeds.kind for speeds in TABLE))


def measured(kind: str, rows: int) -> Speeds | None:
    """The entry that stands for `rows` rows: the next larger number that was measured; None beyond the table."""
    return min((s for s in TABLE if s.kind == kind and s.rows >= rows), key=lambda s: s.rows, default=None)


def choose(kind: str, rows: int) -> str:
    """`compiled` or `torch` for a product of `rows` rows with a weight of one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known are {', '.join(KINDS)}")
    speeds = measured(kind, rows)
    return "compiled" if speeds is not None and speeds.compiled > speeds.torch and available() else "torch"
