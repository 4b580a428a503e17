"""Which path multiplies few rows by a weight on a CPU: what was measured, as data, and the choice that follows.

Speeds are relative to a bf16 product by `torch.nn.functional.linear` of the same shape, which is 1. `compiled` are the
loops of this folder; `torch` what `matvec.py` calls otherwise; `packed` is oneDNN's product with a weight in its own
layout, for those who keep one.
"""

from __future__ import annotations

from dataclasses import dataclass

from trine.kernels.cpu.compiled import available

# Medians of interleaved rounds on a busy machine, weights read from memory: good to a tenth or two.
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
    Speeds("bfloat16", 1, compiled=1.29, torch=1.0, packed=1.31),
    Speeds("bfloat16", 2, compiled=1.17, torch=1.0, packed=1.33),
    Speeds("bfloat16", 3, compiled=0.81, torch=1.0, packed=1.5),
    Speeds("bfloat16", 4, compiled=0.79, torch=1.0, packed=1.6),
    Speeds("bfloat16", 8, compiled=0.49, torch=1.0, packed=1.71),
    Speeds("float32", 1, compiled=0.74, torch=0.38, packed=0.68),
    Speeds("float32", 2, compiled=0.72, torch=0.19, packed=0.55),
    Speeds("float32", 3, compiled=0.70, torch=0.17, packed=0.6),
    Speeds("float32", 4, compiled=0.70, torch=0.25, packed=0.65),
    Speeds("float32", 8, compiled=0.44, torch=0.25, packed=0.5),
    # int8 weights with a scale a row: by rows of bf16 (torch: int8pack) and of fp32 (torch: dequantized first).
    Speeds("int8 by bfloat16", 1, compiled=2.26, torch=2.15),
    Speeds("int8 by bfloat16", 2, compiled=1.95, torch=2.06),
    Speeds("int8 by bfloat16", 3, compiled=1.14, torch=1.9),
    Speeds("int8 by bfloat16", 4, compiled=1.0, torch=2.04),
    Speeds("int8 by float32", 1, compiled=2.26, torch=0.29),
    Speeds("int8 by float32", 2, compiled=1.95, torch=0.18),
    Speeds("int8 by float32", 3, compiled=1.22, torch=0.15),
    Speeds("int8 by float32", 4, compiled=1.13, torch=0.18),
    Speeds("int8 by float32", 8, compiled=0.52, torch=0.15),
    # int8 on both sides (torch: _int_mm; packed: qlinear).
    Speeds("int8 by int8", 1, compiled=2.53, torch=2.43, packed=2.13),
    Speeds("int8 by int8", 2, compiled=2.26, torch=1.32, packed=2.08),
    Speeds("int8 by int8", 3, compiled=1.91, torch=1.42, packed=2.52),
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
