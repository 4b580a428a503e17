"""Compiles what a benchmark of kernels will launch, in several processes beforehand.

One process would spend most of a run compiling, case after case, while the GPU waits. Here each case is run once in one
of several processes, untimed: what Triton and torch.compile make stays in their caches on disk.
"""

from __future__ import annotations

import gc
import os
import time
from multiprocessing import TimeoutError as NoAnswer
from multiprocessing import get_context
from multiprocessing.pool import Pool

import torch

from trine.benchmarks.kernel_check import Expected, as_tuple
from trine.benchmarks.kernel_problem import Case, all_cases
from trine.engine.log import say

# A case that takes longer is left to the benchmark itself.
PATIENCE_SECONDS = 120


def new_pool(most: int = 12) -> Pool:
    """Processes that each have a context of their own on the GPU: as many as there are cores to spare."""
    return get_context("spawn").Pool(max(1, min(most, (os.cpu_count() or 2) - 2)))


def compile_beforehand(cases: list[Case], device: torch.device, dtype: torch.dtype) -> None:
    """Run every contestant of every case once. What fails is not reported: the benchmark itself will meet it."""
    begin = time.monotonic()
    every = all_cases()
    jobs = [(every.index(case), str(device), dtype) for case in cases]
    pool = new_pool(min(12, len(jobs)))
    try:
        answers = pool.imap_unordered(_run_once, jobs)
        for _ in jobs:
            answers.next(timeout=PATIENCE_SECONDS)
    except NoAnswer:
        say(f"compiling beforehand: no answer in {PATIENCE_SECONDS} s, going on without the rest")
    finally:
        pool.terminate()
    say(f"compiled beforehand in {time.monotonic() - begin:.0f} s")


def _run_once(job: tuple[int, str, torch.dtype]) -> None:
    place, device, dtype = job
    try:
        problem = all_cases()[place].problem(torch.device(device), dtype)
        expected = Expected(problem)
    except Exception:
        return
    for forward in (problem.ours, *problem.variants.values(), *(problem.peers or {"formula": problem.plain}).values()):
        try:
            backward = expected.backward(as_tuple(forward()))
            if backward is not None:
                backward()
            torch.cuda.synchronize()
        except Exception:  # noqa: S112 - whatever compilers and drivers raise; see `compile_beforehand`
            continue
    del problem, expected, forward
    gc.collect()
    torch.cuda.empty_cache()
