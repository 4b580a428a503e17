"""`trine bench kernels`: every kernel against the best peer present, and against what the device can do at most.

    python -m trine.benchmarks.kernels '{"quick": true}'        (the fields of `Settings`; where typer is not installed)

A case times forward, backward and both, contestants in turns, with a copy and a matrix product among them: the ceiling
of a pass is the time its bytes take at the speed of the copy, or its operations at that of the product, whichever is
longer. Errors are measured before anything is timed, against float64 on a part of the result: the largest, over the
root mean square of the exact values. The last line on stdout is one JSON object. Without a GPU the torch paths are
timed, at small sizes.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trine.benchmarks.kernel_check import Backward, Expected, as_tuple, dtype_name, first_line
from trine.benchmarks.kernel_problem import Case, Cost, Problem, Results, all_cases
from trine.benchmarks.kernel_warming import compile_beforehand
from trine.benchmarks.timing import Ceilings, Spread, Stopwatch
from trine.engine import env
from trine.engine.errors import UsageError
from trine.engine.log import say
from trine.kernels.hardware import INTERPRETING

OURS, FORMULA = "trine", "formula"


@dataclass(frozen=True)
class Settings:
    """`operations`: names, all where empty. `minutes`: no case is begun after so many; 0 is no limit."""

    operations: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    rounds: int = 5
    out: str = ""
    tune: bool = False
    quick: bool = False
    minutes: float = 0.0


def run(settings: Settings) -> int:
    """Measure, or tune; prints as it goes. Returns the exit status: 1 where a kernel of ours failed."""
    device = env.choose_device(settings.device)
    dtype, _ = env.choose_dtype(device, settings.dtype)
    if INTERPRETING:
        raise UsageError("TRITON_INTERPRET is set, and the interpreter's time says nothing; unset it")
    cases = select(settings, on_gpu=device.type == "cuda")
    env.set_threads(0)
    if settings.tune:
        from trine.benchmarks.kernel_tuning import tune

        return tune(cases, device, dtype, minutes=settings.minutes)
    return Bench(settings, device, dtype).run(cases)


def select(settings: Settings, *, on_gpu: bool) -> list[Case]:
    """The cases that were asked for. Raises UsageError for an operation that has none."""
    known = dict.fromkeys(case.operation for case in all_cases())
    for name in settings.operations:
        if name not in known:
            raise UsageError(f"unknown operation {name!r}; one of {', '.join(known)}")
    wanted = settings.operations or tuple(known)
    return [c for c in all_cases() if c.operation in wanted and c.on_gpu == on_gpu and (c.quick or not settings.quick)]


class Bench:
    """One run: its rows, what was left out and why."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.failed = False
        self.environment = env.environment(device)

    def run(self, cases: list[Case]) -> int:
        """Measure every case, print the table and the JSON line."""
        if self.device.type != "cuda":
            say("no GPU: torch paths on CPU, at small sizes, against the plain formula in torch")
        if env.load_average()[0] > 0.5 * self.environment["cpu_cores"]:
            say(f"this machine is busy (load {env.load_average()[0]:.1f}): times may be far too long")
        begin, limit = time.monotonic(), 60 * self.settings.minutes
        self._write()
        if self.device.type == "cuda":
            compile_beforehand(cases, self.device, self.dtype)
        watch = Stopwatch(self.device, turn_seconds=0.01 if self.settings.quick or self.device.type == "cuda" else 0.03)
        ceilings = Ceilings(self.device, self.dtype)
        for call in (ceilings.copy, ceilings.product):
            watch.warm_up(call)
        print(HEADER)
        for case in cases:
            if limit and time.monotonic() - begin > limit:
                self.leave_out(case, "", f"not run: {self.settings.minutes:g} minutes are over")
                continue
            try:
                self.measure(case, watch, ceilings)
            except Exception as error:  # whatever our kernel, the compiler or the driver raises is the finding
                self.failed = True
                self.leave_out(case, OURS, f"FAILED: {first_line(error)}")
            self._clean()
            self._write()
        print(json.dumps(self.result()))
        return 1 if self.failed else 0

    def measure(self, case: Case, watch: Stopwatch, ceilings: Ceilings) -> None:
        """Check and time one case."""
        problem = case.problem(self.device, self.dtype)
        forwards = {OURS: problem.ours, **problem.variants, **(problem.peers or {FORMULA: problem.plain})}
        expected = Expected(problem)
        backwards: dict[str, Backward] = {}
        errors: dict[str, tuple[float, float | None]] = {}
        for name, forward in list(forwards.items()):
            try:
                results = as_tuple(forward())
                backward = expected.backward(results)
                errors[name] = expected.errors(results, backward)
                watch.warm_up(forward)
                if backward is not None:
                    watch.warm_up(backward)
                    backwards[name] = backward
            except Exception as error:
                if name == OURS:
                    raise
                # A peer that does not support a case says so in whatever way it likes.
                del forwards[name]
                self.leave_out(case, name, first_line(error))
        _check_errors(errors)
        for what, calls, cost in _passes(problem, forwards, backwards):
            contestants = {**calls, "copy": ceilings.copy, "product": ceilings.product}
            seconds = watch.race(contestants, self.settings.rounds)
            place = {"forward": 0, "backward": 1}.get(what)
            found = {name: None if place is None else pair[place] for name, pair in errors.items()}
            mine = [name for name in (OURS, *problem.variants) if name in seconds]
            for name in mine:
                row = _row(case, what, problem.dtype or self.dtype, cost, seconds, ceilings, found, name, mine)
                self.rows.append(row)
                print(_format(row), flush=True)

    def leave_out(self, case: Case, contestant: str, reason: str) -> None:
        """Say and keep that something was not measured."""
        self.left_out.append(
            {"operation": case.operation, "shape": case.shape, "contestant": contestant, "reason": reason}
        )
        say(f"  {case.operation} {case.shape}: {contestant}{': ' if contestant else ''}{reason}")

    def result(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "benchmark": "kernels",
            **asdict(self.settings),
            "dtype": dtype_name(self.dtype),
            "rows": self.rows,
            "left_out": self.left_out,
            "environment": self.environment,
        }

    def _write(self) -> None:
        """After every case, so that a run that is stopped leaves what it has."""
        if self.settings.out:
            path = Path(self.settings.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.result()) + "\n", encoding="utf-8")

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            torch.cuda.synchronize(self.device)  # an error of the device ends the run here: nothing after it counts


def _check_errors(errors: dict[str, tuple[float, float | None]]) -> None:
    """Raise ValueError where our numbers are plainly wrong: not finite, or far off and far worse than any other's."""
    for place, what in enumerate(("results", "gradients")):
        mine, *others = (pair[place] for pair in errors.values())
        if mine is not None and not (mine < 1 or mine < 4 * max((x for x in others if x is not None), default=0.0)):
            raise ValueError(f"wrong {what}: the largest error is {mine:.1e} of a typical value")


def _passes(
    problem: Problem, forwards: dict[str, Callable[[], Results]], backwards: dict[str, Backward]
) -> Iterator[tuple[str, dict[str, Callable[[], object]], Cost]]:
    """What is timed: name, contestants, cost."""
    yield "forward", dict(forwards), problem.forward
    if problem.backward is None:
        return
    yield "backward", dict(backwards), problem.backward
    cost = Cost(problem.forward.flops + problem.backward.flops, problem.forward.bytes + problem.backward.bytes)
    yield "both", {name: _both(problem, forward) for name, forward in forwards.items()}, cost


def _both(problem: Problem, forward: Callable[[], Results]) -> Callable[[], object]:
    results = as_tuple(forward())
    gradients = [torch.randn_like(y) for y in results]
    return lambda: torch.autograd.grad(as_tuple(forward()), problem.leaves, gradients)


def _row(
    case: Case,
    what: str,
    dtype: torch.dtype,
    cost: Cost,
    seconds: dict[str, list[float]],
    ceilings: Ceilings,
    errors: dict[str, float | None],
    name: str,
    mine: list[str],
) -> dict[str, Any]:
    """Figures of `name`, one of `mine`, in a pass, as JSON values; `ratio`: the best peer's time over it, by rounds."""
    spreads = {name: Spread.of(rounds) for name, rounds in seconds.items()}
    moving = cost.bytes * spreads["copy"].median / ceilings.bytes
    computing = cost.flops * spreads["product"].median / ceilings.flops
    ours = spreads[name].median
    row: dict[str, Any] = {
        "operation": case.operation,
        "contestant": name,
        "shape": case.shape,
        "sizes": dict(case.sizes),
        "dtype": dtype_name(dtype),
        "pass": what,
        "microseconds": {who: 1e6 * spread.median for who, spread in spreads.items()},
        "spread": {who: (s.slowest - s.fastest) / s.median for who, s in spreads.items()},
        "bound": "compute" if computing > moving else "memory",
        "tflops": cost.flops / ours / 1e12,
        "gigabytes_per_second": cost.bytes / ours / 1e9,
        "percent_of_ceiling": 100 * max(moving, computing) / ours,
        "errors": errors,
    }
    peers = [who for who in seconds if who not in (*mine, "copy", "product")]
    if peers:
        best = min(peers, key=lambda who: spreads[who].median)
        ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds[name], strict=True)]
        row |= {"peer": best, "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return row


HEADER = (
    f"{'operation':<20} {'shape':<34} {'dtype':<5} {'pass':<8} {'us':>10} {'spread':>6}  {'rate':>13} {'ceiling':>7}  "
    f"{'ratio':>6} {'best peer':<20} {'error':>8} {'peer':>8}"
)


def _format(row: dict[str, Any]) -> str:
    compute = row["bound"] == "compute"
    rate = f"{row['tflops']:.4g} TFLOP/s" if compute else f"{row['gigabytes_per_second']:.4g} GB/s"
    who = row["contestant"]
    errors = (row["errors"].get(name) for name in (who, row.get("peer", "")))
    operation = row["operation"] if who == OURS else f"{row['operation']}, {who}"
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    dtype = row["dtype"].replace("bfloat", "bf").replace("float", "fp")
    return (
        f"{operation:<20} {row['shape']:<34} {dtype:<5} {row['pass']:<8} {row['microseconds'][who]:>10,.1f} "
        f"{row['spread'][who]:>6.0%}  {rate:>13} {row['percent_of_ceiling']:>6.1f}%  {ratio:>6} "
        f"{row.get('peer', '-'):<20} {' '.join(f'{e:>8.1e}' if e is not None else ' ' * 8 for e in errors)}"
    ).rstrip()


if __name__ == "__main__":
    given = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    try:
        sys.exit(run(Settings(**{**given, "operations": tuple(given.get("operations", ()))})))
    except UsageError as error:
        print(f"kernels: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
