"""Decoding steps on a GPU as captured graphs: one launch instead of hundreds.

A graph has fixed shapes, so a step is padded to the next of a few batch sizes and of a few lengths; one graph is
captured for each pair, after a run that compiles the kernels: all of them at once (`capture_all`, when a server
starts), or each when it first comes up. A padding row feeds token 0, writes to the block that nobody reads and sees
that one key.

Shapes: R rows (sequences with one new token each), M entries of a table row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.kernels.last_program import graph_counters

Array = np.ndarray[Any, Any]
# Rows of the graphs up to 16; beyond, multiples of 16. Keys grow by this factor from one graph to the next.
SMALL_SIZES = (1, 2, 4, 8, 16)
FIRST_LENGTH = 1024
LENGTH_FACTOR = 4


def kind_of(rows: int, length: int, max_rows: int, max_tokens: int) -> tuple[int, int]:
    """Rows and keys of the graph for a step of `rows` sequences, the longest of `length` tokens."""
    size = next((small for small in SMALL_SIZES if small >= rows), -(-rows // 16) * 16)
    longest = FIRST_LENGTH
    while longest < length:
        longest *= LENGTH_FACTOR
    return min(size, max_rows), min(longest, max_tokens)


def kinds(max_rows: int, max_tokens: int) -> list[tuple[int, int]]:
    """All that `kind_of` gives for 1 to `max_rows` sequences of 1 to `max_tokens` tokens; the smallest first."""
    lengths = [FIRST_LENGTH]
    while lengths[-1] < max_tokens:
        lengths.append(lengths[-1] * LENGTH_FACTOR)
    sizes = {kind_of(rows, 1, max_rows, max_tokens)[0] for rows in range(1, max_rows + 1)}
    return [(size, min(length, max_tokens)) for length in lengths for size in sorted(sizes)]


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph with the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids_R: Tensor
    step: PagedStep
    logits_RV: Tensor
    counters: Tensor


@dataclass(frozen=True, slots=True)
class Late:
    """Ids that the host does not know yet: place n of a step takes `tokens_R[rows[n]]`, where rows[n] is not -1.

    `tokens_R`: int64 on the device. `rows`: int64 [N].
    """

    tokens_R: Tensor
    rows: Array

    def put(self, ids_N: Tensor, rows_N: Tensor) -> Tensor:
        """The ids with those in their places; `rows_N` is `rows` on the device."""
        return torch.where(rows_N < 0, ids_N, self.tokens_R[rows_N.clamp(min=0)])


class DecodeGraphs:
    """The graphs of one model over one cache.

    Args:
        compute: (ids [1, R], step) to logits [R, V].
        cache: the pools.
        max_rows, max_tokens: the most sequences of a step, and tokens of a sequence.
        deterministic: of the steps.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, PagedStep], Tensor],
        cache: PagedCache,
        *,
        max_rows: int,
        max_tokens: int,
        deterministic: bool = False,
    ) -> None:
        self._compute = compute
        self._deterministic = deterministic
        self._cache = cache
        self._max_rows, self._max_tokens = max_rows, min(max_tokens, cache.num_blocks * cache.block_size)
        self._captured: dict[tuple[int, int], Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()

    @property
    def num_kinds(self) -> int:
        """Graphs so far."""
        return len(self._captured)

    def run(
        self, ids: Array, positions: Array, slots: Array, table: Array, lengths: Array, *, late: Late | None = None
    ) -> Tensor:
        """fp32 logits [R, V] of one step, overwritten by the next.

        ids, positions, slots: int64 [R]; lengths (the new tokens counted): int32 [R]; table: int32 [R, M].
        """
        rows = len(ids)
        size, longest = kind_of(rows, int(lengths.max()), self._max_rows, self._max_tokens)
        captured = self._captured.get((size, longest))
        if captured is None:
            captured = self._captured[size, longest] = self._capture(size, longest)
        step = captured.step
        width = step.block_table_RM.shape[1]
        packed = np.zeros((size, 5 + width), np.int64)
        packed[:, 2], packed[:, 3], packed[:, 4] = self._cache.padding_slot, 1, -1
        packed[:, 5:] = self._cache.num_blocks
        packed[:rows, 0], packed[:rows, 1], packed[:rows, 2], packed[:rows, 3] = ids, positions, slots, lengths
        # A sequence may hold a block more, for guesses that this step does not compute.
        table = table[:, :width]
        packed[:rows, 5 : 5 + table.shape[1]] = table
        if late is not None:
            packed[:rows, 4] = late.rows
        inputs = torch.from_numpy(packed).pin_memory().to(self._cache.device, non_blocking=True)
        captured.ids_R.copy_(inputs[:, 0] if late is None else late.put(inputs[:, 0], inputs[:, 4]))
        step.positions_BT.copy_(inputs[None, :, 1])
        step.slots_N.copy_(inputs[:, 2])
        step.lengths_R.copy_(inputs[:, 3])
        step.block_table_RM.copy_(inputs[:, 5:])
        captured.graph.replay()
        return captured.logits_RV[:rows]

    def capture_all(self) -> None:
        """Every graph that a step can ask for; the largest first, whose memory the others then share."""
        for kind in reversed(kinds(self._max_rows, self._max_tokens)):
            if kind not in self._captured:
                self._captured[kind] = self._capture(*kind)

    def _capture(self, size: int, longest: int) -> Captured:
        cache, device = self._cache, self._cache.device
        width = -(-longest // cache.block_size)
        ids_R = torch.zeros(size, dtype=torch.int64, device=device)
        step = PagedStep(
            cache=cache,
            positions_BT=torch.zeros(1, size, dtype=torch.int64, device=device),
            slots_N=torch.full((size,), cache.padding_slot, dtype=torch.int64, device=device),
            block_table_RM=torch.full((size, width), cache.num_blocks, dtype=torch.int32, device=device),
            lengths_R=torch.ones(size, dtype=torch.int32, device=device),
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            max_queries=1,
            num_slots=longest,
            deterministic=self._deterministic,
        )
        # What a kernel does when it is first used (compiling, choosing) cannot be captured.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute(ids_R[None], step)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with graph_counters(device) as counters, torch.cuda.graph(graph, pool=self._memory):
            logits_RV = self._compute(ids_R[None], step)
        return Captured(graph, ids_R, step, logits_RV, counters)
