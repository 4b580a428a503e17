"""Merging the parts of a tile without a second launch: the program that comes last does it.

A product or an attention of little work is split, so that enough programs read memory at once. Each stores its part,
and something has to wait for all parts of a tile and merge them in their order. A second launch waits for the whole
first one. Here programs count themselves, tile by tile, and the one that finds all others of its tile done merges:

    store the part      all threads of the program
    barrier             so that all of them come before what follows
    count + 1           one thread, acquire and release, for the whole GPU: it publishes what the barrier ordered before
                        it, and of whoever counted earlier it makes the parts visible
    barrier             the count goes to all threads through shared memory
    was it the last?    then set the counter to 0 and read all parts, past the first cache

Nobody waits for another program, so nothing can hang, and which one is last changes no bit: parts are merged in the
order of the splits. Counters are 0 before and after every launch, so a graph can be replayed without clearing them.

On AMD GPUs this does not hold: a barrier of Triton's waits there for shared memory only, so the stores of other waves
may be on their way when the count is published. There, and where the pair of triton and GPU is not in
`tuned/verified.json`, a second launch merges (`last_program_check.py` adds the pair).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.samples import Sample
from trine.kernels.target import Target, target_of
from trine.kernels.verified import Experimental

LAST_PROGRAM = Experimental("last_program", "merging by the last program")
# Tiles that the counters of a stream serve at first, and of a graph always: 64 KiB.
_NUMBER = 16384

_of_graph: ContextVar[Tensor | None] = ContextVar("counters of the graph that is captured", default=None)
# By device and stream: kernels of one stream follow each other, those of two may run at once.
_of_stream: dict[tuple[int, int], Tensor] = {}


@triton.jit
def is_last(counter_ptr, programs):
    """Whether this program is the last of `programs` to come here; what the others stored before can then be loaded.

    Load it past the first cache (`cache_modifier=".cg"`).
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def selected(target: Target) -> bool:
    """Whether parts are merged by the program that comes last: forced, or verified with this triton on this GPU.

    Raises ValueError where it is forced on an AMD GPU.
    """
    return LAST_PROGRAM.selected(target, True, lambda: f"{target.arch} is an AMD GPU" if target.is_amd else None)


def counters(like: Tensor, number: int) -> Tensor | None:
    """int32 zeros, at least `number`, for a kernel on the current stream of the device of `like`; None: launch twice.

    Also None while a graph is captured outside of `graph_counters`: when and beside what it will run is not known.
    """
    if not selected(target_of(like)):
        return None
    if not like.is_cuda:
        # Without memory where launches are recorded; in the interpreter each launch ends before the next.
        return torch.zeros(number, dtype=torch.int32, device=like.device)
    kept = _of_graph.get()
    if kept is not None:
        return kept if kept.device == like.device and len(kept) >= number else None
    if torch.cuda.is_current_stream_capturing():
        return None
    place = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
    found = _of_stream.get(place)
    if found is None or len(found) < number:
        # The memory of a smaller one goes back to this stream, whose kernels before have it to their end.
        found = _of_stream[place] = torch.zeros(max(number, _NUMBER), dtype=torch.int32, device=like.device)
    return found


@contextmanager
def graph_counters(device: torch.device) -> Iterator[Tensor]:
    """Counters for the kernels of one graph, which is captured within this block: keep them as long as the graph.

    A graph may run beside what its stream runs eagerly, and beside other graphs, but not beside itself.
    """
    kept = torch.zeros(_NUMBER, dtype=torch.int32, device=device)
    token = _of_graph.set(kept)
    try:
        yield kept
    finally:
        _of_graph.reset(token)


def in_one_launch(sample: Sample) -> Sample:
    """The sample with its parts merged by the last program, for NVIDIA's GPUs."""

    def call() -> None:
        with LAST_PROGRAM.force(True):
            sample.call()

    targets = tuple(name for name in sample.targets or ("sm_80", "sm_90", "sm_100") if name.startswith("sm_"))
    return replace(sample, name=f"{sample.name} in one launch", call=call, targets=targets)
