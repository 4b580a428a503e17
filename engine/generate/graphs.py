"""Decoding steps on a GPU as captured graphs: one launch instead of hundreds.

A graph has fixed shapes, so a step is padded to the next of a few batch sizes and of a few lengths; one graph is
captured for each pair when it first comes up, after a run that compiles the kernels. A padding row feeds token 0,
writes to the block that nobody reads and sees that one key.

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

Array = np.ndarray[Any, Any]
# Rows of the graphs up to 16; beyond, multiples of 16. Keys grow by this factor from one graph to the next.
SMALL_SIZES = (1, 2, 4, 8, 16)
FIRST_LENGTH = 1024
LENGTH_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph with the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids_R: Tensor
    step: PagedStep
    logits_RV: Tensor


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
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._captured: dict[tuple[int, int], Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()

    @property
    def num_kinds(self) -> int:
        """Graphs so far."""
        return len(self._captured)

    def run(self, ids: Array, positions: Array, slots: Array, table: Array, lengths: Array) -> Tensor:
        """fp32 logits [R, V] of one step, overwritten by the next.

        ids, positions, slots: int64 [R]; lengths (the new tokens counted): int32 [R]; table: int32 [R, M].
        """
        rows = len(ids)
        size, longest = self.sizes(rows, int(lengths.max()))
        captured = self._captured.get((size, longest))
        if captured is None:
            captured = self._captured[size, longest] = self._capture(size, longest)
        step = captured.step
        width = step.block_table_RM.shape[1]
        packed = np.zeros((size, 4 + width), np.int64)
        packed[:, 2], packed[:, 3] = self._cache.padding_slot, 1
        packed[:, 4:] = self._cache.num_blocks
        packed[:rows, 0], packed[:rows, 1], packed[:rows, 2], packed[:rows, 3] = ids, positions, slots, lengths
        # A sequence may hold a block more, for guesses that this step does not compute.
        table = table[:, :width]
        packed[:rows, 4 : 4 + table.shape[1]] = table
        inputs = torch.from_numpy(packed).pin_memory().to(self._cache.device, non_blocking=True)
        captured.ids_R.copy_(inputs[:, 0])
        step.positions_BT.copy_(inputs[None, :, 1])
        step.slots_N.copy_(inputs[:, 2])
        step.lengths_R.copy_(inputs[:, 3])
        step.block_table_RM.copy_(inputs[:, 4:])
        captured.graph.replay()
        return captured.logits_RV[:rows]

    def sizes(self, rows: int, length: int) -> tuple[int, int]:
        """Rows and keys of the graph for a step of so many."""
        size = next((small for small in SMALL_SIZES if small >= rows), -(-rows // 16) * 16)
        longest = FIRST_LENGTH
        while longest < length:
            longest *= LENGTH_FACTOR
        return min(size, max(self._max_rows, rows)), min(longest, max(self._max_tokens, length))

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
        with torch.cuda.graph(graph, pool=self._memory):
            logits_RV = self._compute(ids_R[None], step)
        return Captured(graph, ids_R, step, logits_RV)
