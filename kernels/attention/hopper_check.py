"""Checks the Hopper attention kernel on a GPU, against its twin and float64, and lets it be used where it passes.

    python -m trine.kernels.attention.hopper_check [--group NAME ...] [--verify]

How groups of cases run, and what passing lets happen: `gpu_checks.py`. A case passes if errors against float64 are at
most twice the twin's plus a floor, a second run gives the same bits, and no result is left unwritten (results hold NaN
before).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels.attention.bounds import Bounds, document_bounds, make_bounds
from trine.kernels.attention.forward import launch_forward
from trine.kernels.attention.hopper import EXPERIMENTAL, OPERATION, obstacle, options_of
from trine.kernels.attention.options import Options
from trine.kernels.attention.reference import attend
from trine.kernels.gpu_checks import Checks, new_tensors_hold_nan
from trine.kernels.target import target_of

BF16, FP16 = torch.bfloat16, torch.float16
# Largest error that needs no comparison with the twin's: (output, log-sum-exp).
FLOORS = {BF16: (4e-3, 1e-5), FP16: (5e-4, 1e-5)}
# What float64 scores of one head may take, copies included.
EXACT_BYTES = 8e9


@dataclass(frozen=True)
class Case:
    """A call. `mask`: causal, full, window, documents, padding or cache; the sizes as everywhere."""

    mask: str
    B: int
    H: int
    K: int
    T: int
    S: int
    D: int
    dtype: torch.dtype = BF16
    sinks: bool = False


GROUPS: dict[str, tuple[Case, ...]] = {
    "one block": (Case("full", 1, 1, 1, 1, 1, 128), Case("full", 1, 2, 1, 128, 128, 128)),
    "some blocks": tuple(Case("causal", 1, 2, 1, T, T, 128) for T in (128, 300, 1000)),
    "head 64": (Case("causal", 2, 4, 2, 777, 777, 64), Case("full", 2, 4, 4, 333, 1111, 64)),
    "head 256": (Case("causal", 2, 4, 2, 777, 777, 256), Case("full", 2, 4, 4, 333, 1111, 256)),
    "windows": tuple(Case("window", 3, 4, 2, 1500, 1500, D, sinks=D == 64) for D in (64, 128, 256)),
    "documents": (Case("documents", 3, 4, 2, 1500, 1500, 128), Case("documents", 3, 4, 2, 1500, 1500, 64, FP16)),
    "padding": (Case("padding", 3, 4, 2, 1500, 1500, 128), Case("cache", 3, 4, 2, 70, 1500, 128)),
    "real": (Case("causal", 4, 16, 16, 8192, 8192, 128), Case("full", 2, 16, 16, 4096, 4096, 128, FP16)),
    "long": (
        Case("causal", 1, 32, 8, 16384, 16384, 128),
        Case("documents", 1, 16, 4, 32768, 32768, 128),
        Case("causal", 1, 4, 1, 65536, 65536, 128),
    ),
}


def check(case: Case) -> tuple[list[str], str]:
    """What is wrong with the kernel's results in a case; nothing else is noticed."""
    (q, k, v), options, bounds = make(case)
    reason = obstacle(q, k, v, options, target_of(q))
    if reason is not None:
        return [f"not computed by the kernel: {reason}"], ""
    with EXPERIMENTAL.force(use=True), new_tensors_hold_nan():
        found = launch_forward(q, k, v, options)
        torch.cuda.synchronize()
        again = launch_forward(q, k, v, options)
    with EXPERIMENTAL.force(use=False):
        twin = launch_forward(q, k, v, options)
    problems = []
    if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        problems.append("two runs differ")
    names = ("output", "log-sum-exp")
    errors, twin_errors = (errors_of(result, case, (q, k, v), options, bounds) for result in (found, twin))
    for name, error, twin_error, floor in zip(names, errors, twin_errors, FLOORS[case.dtype], strict=True):
        if not error <= 2 * twin_error + floor:
            problems.append(f"{name}: error {error:.2e}, the twin's {twin_error:.2e}")
    return problems, ""


def make(case: Case) -> tuple[tuple[Tensor, Tensor, Tensor], Options, Bounds | None]:
    """Inputs, options and bounds of a case, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(case.dtype)

    q = draw(case.B, case.T, case.H, case.D).transpose(1, 2)
    k, v = (draw(case.B, case.S, case.K, case.D).transpose(1, 2) for _ in range(2))
    bounds = _bounds(case)
    sinks = draw(case.H) if case.sinks else None
    causal = case.mask in ("causal", "padding", "cache", "documents")
    return (q, k, v), options_of(bounds, causal=causal, scale=case.D**-0.5, sinks_H=sinks), bounds


def _bounds(case: Case) -> Bounds | None:
    positions = torch.arange(case.T, device="cuda").expand(case.B, -1)
    if case.mask == "window":
        return make_bounds(positions[:1], case.S, causal=False, window=(300, 40))
    if case.mask == "documents":
        ends = torch.tensor([0.003, 0.3, 0.31, 0.8], device="cuda") * case.T
        start, end = document_bounds(torch.searchsorted(ends, positions.float(), right=True))
        return make_bounds(positions, case.S, causal=True, start_BT=start, end_BT=end)
    if case.mask == "padding":
        lengths = torch.linspace(0, case.S, case.B, device="cuda").long()[:, None].expand(-1, case.T)
        return make_bounds(positions, case.S, causal=True, end_BT=lengths)
    if case.mask == "cache":
        return make_bounds(positions + (case.S - case.T), case.S, causal=True)
    return None


def errors_of(
    found: tuple[Tensor, Tensor],
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    options: Options,
    bounds: Bounds | None,
) -> tuple[float, float]:
    """Largest errors of (o, lse) against float64, of all queries, or of some of each tile where scores do not fit."""
    q, k, v = inputs
    rows = _rows(case).to("cuda")
    worst = torch.zeros(2, dtype=torch.float64, device="cuda")
    for batch in range(case.B):
        visible = _visible(case, bounds, batch, rows)
        for head in range(case.H):
            kv = head // (case.H // case.K)
            sinks = None if options.sinks_H is None else options.sinks_H[head : head + 1].double()
            exact = attend(
                q[batch, head, rows][None, None].double(),
                k[batch, kv][None, None].double(),
                v[batch, kv][None, None].double(),
                visible_BTS=visible,
                scale=options.scale,
                sinks_H=sinks,
            )
            for place, (mine, theirs) in enumerate(zip(found, exact, strict=True)):
                difference = (mine[batch, head, rows].double() - theirs[0, 0]).abs()
                # Where both are -inf there is no error; what is NaN stays so.
                difference = torch.where(mine[batch, head, rows] == theirs[0, 0], 0.0, difference)
                worst[place] = torch.maximum(worst[place], difference.max())
    return float(worst[0]), float(worst[1])


def _rows(case: Case) -> Tensor:
    fitting = int(EXACT_BYTES // (8 * 6 * case.S))
    if fitting >= case.T:
        return torch.arange(case.T)
    # Some rows of every tile: the first and the last of each half, and the tail of all.
    tiles = torch.arange(0, case.T, 64)
    rows = torch.cat((tiles, (tiles + 63).clamp(max=case.T - 1), torch.arange(case.T - 100, case.T)))
    unique: Tensor = rows.unique()
    return unique[-fitting:]


def _visible(case: Case, bounds: Bounds | None, batch: int, rows: Tensor) -> Tensor | None:
    if case.mask == "full":
        return None
    keys = torch.arange(case.S, device="cuda")
    if bounds is None:
        return (keys <= rows[:, None])[None]
    place = batch if bounds.low_BT.shape[0] > 1 else 0
    low, high = bounds.low_BT[place, rows, None], bounds.high_BT[place, rows, None]
    return ((keys >= low) & (keys < high))[None]


CHECKS = Checks("trine.kernels.attention.hopper_check", OPERATION, GROUPS, check)

if __name__ == "__main__":
    sys.exit(CHECKS.main())
