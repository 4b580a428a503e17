"""Running a compiled step with all threads at once: the team of OpenMP that torch's own operations run on.

Numba starts threads of its own; where torch's operations come between, two sets of threads that each wait by spinning
take the cores from each other. So the compiled function is handed to the OpenMP library that torch has loaded. Where it
has none that can be called so (it is libgomp's interface, which LLVM's libomp has too), Numba's threads run it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from trine.kernels.cpu.compiled import use_torch_threads

log = logging.getLogger(__name__)
_NAMES = ("GOMP_parallel", "sched_yield", "omp_get_thread_num", "omp_get_num_threads")


@dataclass(frozen=True, slots=True)
class Team:
    """Its functions and C's `sched_yield`: `start` to be called, the others' addresses for compiled code."""

    start: Any
    yield_core: int
    thread_number: int
    size: int


@lru_cache(maxsize=1)
def team() -> Team | None:
    """Torch's OpenMP, or None where it cannot be called: logged once."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    functions: list[Any] = [getattr(library, name, None) for name in _NAMES]
    if None in functions:
        log.info("compiled steps run on Numba's threads: torch has loaded no OpenMP library with %s", _NAMES[0])
        return None
    start, *others = functions
    start.restype = None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    addresses = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in others)
    return Team(start, *addresses)


def run_step(header: np.ndarray[Any, Any]) -> None:
    """Run `step_loops.py` with as many threads as torch has; the header's own fields of the team are filled in."""
    from trine.kernels.cpu import step_layout_loops as loops
    from trine.kernels.cpu.product_loops import multiply_range, prepare
    from trine.kernels.cpu.step_loops import run_in_loops, run_in_team

    header[loops.PREPARE], header[loops.MULTIPLY] = prepare.address, multiply_range.address
    found = team()
    if found is None:
        header[loops.NUM_THREADS], header[loops.YIELD] = use_torch_threads(), 0
        run_in_loops(header.ctypes.data)
        return
    header[loops.THREAD_NUMBER], header[loops.TEAM_SIZE] = found.thread_number, found.size
    header[loops.YIELD] = found.yield_core
    found.start(run_in_team.address, header.ctypes.data, torch.get_num_threads(), 0)
