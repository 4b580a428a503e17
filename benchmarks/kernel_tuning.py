"""`trine bench kernels --tune`: measure launch configurations on this GPU and keep the best in kernels/tuned/.

Which kernels a case launches, and for which shapes, is seen from the calls of `Tunable.pick` that it makes. For each,
every candidate is forced in turn and the whole pass is timed, the other kernels in it staying as they are; those within
a quarter of the fastest race once more, in turns. A candidate must give what the rule's configuration gives, but for
roundings, and be 2 % faster to replace it. One that does not compile or launch is passed over and named.

Compiling takes most of the time, so several processes do it beforehand, into Triton's cache: each runs the candidates
once, untimed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import TimeoutError as NoAnswer
from typing import Any

import torch
from torch import Tensor

from trine.benchmarks.kernel_check import Expected, as_tuple, dtype_name, first_line
from trine.benchmarks.kernel_problem import Case, Problem, all_cases
from trine.benchmarks.kernel_warming import new_pool
from trine.benchmarks.timing import Spread, Stopwatch
from trine.engine import env
from trine.engine.errors import UsageError
from trine.engine.log import say
from trine.kernels.tuning import Config, Question, force, observing, write_tuned

MARGIN = 0.98
# Of the largest number of the rule's result, in roundings: what candidates may differ by.
ROUNDINGS = 4.0
PATIENCE_SECONDS = 180
Pass = Callable[[], tuple[Tensor, ...]]


def tune(cases: list[Case], device: torch.device, dtype: torch.dtype, *, minutes: float = 0.0) -> int:
    """Tune every kernel that the cases launch; the file is written after each case. Returns the exit status.

    Raises UsageError without a GPU.
    """
    if device.type != "cuda":
        raise UsageError("--tune measures kernels on a GPU and there is none here; run it on the GPU it is meant for")
    begin = time.monotonic()
    tuner = Tuner(device, dtype)
    for case in cases:
        if minutes and time.monotonic() - begin > 60 * minutes:
            say(f"{case.operation} {case.shape}: not tuned, {minutes:g} minutes are over")
            continue
        tuner.tune(case)
        gc.collect()
        torch.cuda.empty_cache()
    tuner.pool.terminate()
    print(f"{tuner.tried} configurations tried, {tuner.failed} of them failed; {tuner.improved} rules improved")
    return 0


@dataclass(frozen=True)
class Candidate:
    """A configuration to try, for one question of one pass of one case; travels to other processes."""

    case: int
    device: str
    dtype: torch.dtype
    backward: bool
    operation: str
    sizes: tuple[tuple[str, int], ...]
    config: Config


class Tuner:
    """Tunes case by case; a question (kernel, shape, dtype) that several cases ask is answered once."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.watch = Stopwatch(device, turn_seconds=0.01)
        self.answered: set[tuple[str, Any, torch.dtype]] = set()
        self.tried = self.failed = self.improved = 0
        self.pool = new_pool()

    def tune(self, case: Case) -> None:
        """All kernels of a case."""
        problem = case.problem(self.device, self.dtype)
        passes, asked = _passes(problem)
        entries = []
        for backward, (run, questions) in enumerate(zip(passes, asked, strict=True)):
            for question in questions:
                key = (question.tunable.operation, question.sizes, question.dtype)
                if key not in self.answered:
                    self.answered.add(key)
                    entries.append(self._search(case, problem, run, question, backward=bool(backward)))
        if entries:
            write_tuned(entries[0]["gpu"], [{k: v for k, v in entry.items() if k != "gpu"} for entry in entries])

    def _search(self, case: Case, problem: Problem, run: Pass, question: Question, *, backward: bool) -> dict[str, Any]:
        """The entry for one question."""
        operation, shape = question.tunable.operation, dict(question.sizes)
        choices = question.tunable.choices(shape, question.dtype, question.target)
        rule, *others = choices
        problem_name = f"{operation} {' '.join(f'{name}={size}' for name, size in shape.items())}"

        def forced(config: Config) -> Pass:
            def call() -> tuple[Tensor, ...]:
                with force({operation: config}, shape=shape):
                    return run()

            return call

        expected = [x.detach().clone() for x in forced(rule)()]
        seconds = {0: self.watch.turn(forced(rule))}
        found = all_cases().index(case), str(self.device), self.dtype, backward, operation, question.sizes
        reasons = self._compile([Candidate(*found, config) for config in others])
        for place, (config, failure) in enumerate(zip(others, reasons, strict=True), start=1):
            reason = failure or self._try(forced(config), expected, in_place=problem.in_place)
            if reason:
                self.failed += 1
                say(f"  {problem_name}: {config.as_json()} left out: {reason}")
                continue
            seconds[place] = self.watch.turn(forced(config))
        self.tried += len(choices)
        fastest = min(seconds.values())
        final = {
            str(place): forced(choices[place]) for place in seconds if seconds[place] <= 1.25 * fastest or not place
        }
        spreads = {int(name): Spread.of(rounds) for name, rounds in self.watch.race(final, 3).items()}
        best = min(spreads, key=lambda place: spreads[place].median)
        if spreads[best].median > MARGIN * spreads[0].median:
            best = 0
        self.improved += best != 0
        gain = spreads[0].median / spreads[best].median
        print(f"{problem_name}: {choices[best].as_json()}, {gain:.2f} x the rule's speed", flush=True)
        return {
            "gpu": question.target.gpu,
            "operation": operation,
            "dtype": dtype_name(question.dtype),
            "shape": shape,
            "config": choices[best].as_json(),
            "microseconds": round(1e6 * spreads[best].median, 2),
            "rule_microseconds": round(1e6 * spreads[0].median, 2),
            "versions": {name: env.package_version(name) for name in ("torch", "triton")},
        }

    def _compile(self, candidates: list[Candidate]) -> list[str]:
        """Run each once in other processes; why it failed, or nothing. One that hangs or ends its process costs it."""
        reasons: list[str] = []
        while len(reasons) < len(candidates):
            results = self.pool.imap(_run_once, candidates[len(reasons) :])
            try:
                while len(reasons) < len(candidates):
                    reasons.append(results.next(timeout=PATIENCE_SECONDS))
            except NoAnswer:
                reasons.append(f"no answer after {PATIENCE_SECONDS} s: it hangs, or its process died")
                self.pool.terminate()
                self.pool = new_pool()
        return reasons

    def _try(self, call: Pass, expected: list[Tensor], *, in_place: bool) -> str:
        """Why a configuration is no good, or nothing."""
        try:
            self.watch.warm_up(lambda: None if in_place else _compare(call(), expected), times=1)
            self.watch.warm_up(call, times=2)
        except Exception as error:  # whatever compiler and driver raise
            torch.cuda.synchronize(self.device)  # a broken device ends the tuning here
            return first_line(error)
        return ""


def _compare(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        if not theirs.numel():
            continue
        # Not every dtype of codes has these operations; and integers are not rounded, they are equal.
        exact = theirs.double()
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        allowed = ROUNDINGS * eps * float(exact.abs().max())
        difference = float((mine.detach().double() - exact).abs().max())
        if not difference <= allowed:
            raise ValueError(f"other numbers than the rule's: {difference:.1e} apart, more than {allowed:.1e}")


def _passes(problem: Problem) -> tuple[list[Pass], list[list[Question]]]:
    """Forward and, where there is one, backward; and the distinct questions that each asks."""
    expected = Expected(problem)
    with observing() as forward_asks:
        results = as_tuple(problem.ours())
    passes: list[Pass] = [lambda: as_tuple(problem.ours())]
    asked = [forward_asks]
    backward = expected.backward(results)
    if backward is not None:
        with observing() as backward_asks:
            backward()
        passes.append(backward)
        asked.append(backward_asks)
    return passes, [list(dict.fromkeys(questions)) for questions in asked]


@lru_cache(maxsize=1)
def _built(case: int, device: str, dtype: torch.dtype) -> list[Pass]:
    return _passes(all_cases()[case].problem(torch.device(device), dtype))[0]


def _run_once(candidate: Candidate) -> str:
    """In a process of the pool: compile and launch a configuration; why it failed, or nothing."""
    try:
        run = _built(candidate.case, candidate.device, candidate.dtype)[candidate.backward]
        with force({candidate.operation: candidate.config}, shape=dict(candidate.sizes)):
            run()
        torch.cuda.synchronize()
    except Exception as error:
        return first_line(error)
    return ""
