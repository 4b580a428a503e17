"""One forward pass over a plan of the scheduler: pieces of prompts and single tokens of many sequences, end to end.

The runner owns what lies on the device: the pools of the key/value cache and, on a GPU, the captured graphs of decoding
steps. Block tables are kept between steps and only what changed is written.

Shapes: N tokens of R chunks, C width, V vocabulary, S slots of a block, M entries of a table row.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.sequence import Sequence
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.transformer import Transformer
from trine.kernels.hardware import CHECKING


class Runner:
    """A model over its paged cache.

    Args:
        model: in evaluation mode.
        cache: its pools; their dtype is the compute dtype, or a quantized one.
        max_running: sequences that hold blocks at one time, at most.
        max_tokens: tokens a sequence can have.
        compute_dtype: of the activations.
    """

    def __init__(
        self, model: Transformer, cache: PagedCache, *, max_running: int, max_tokens: int, compute_dtype: torch.dtype
    ) -> None:
        self.model = model
        self.cache = cache
        self.compute_dtype = compute_dtype
        self._tables = BlockTables(max_running, -(-max_tokens // cache.block_size))

    def forward(self, plan: Plan) -> Tensor:
        """Copy the plan's blocks, compute its tokens; returns the hidden states [N, C] after the final norm."""
        for sequence in plan.preempted:
            self.release(sequence)
        self.cache.copy_blocks(plan.copies)
        ids_N, step = self.make_step(plan.chunks)
        self.cache.step = step
        return self.model(ids_N[None], cache=self.cache, compute_dtype=self.compute_dtype)[0]  # type: ignore[no-any-return]

    def make_step(self, chunks: SequenceOf[Chunk]) -> tuple[Tensor, PagedStep]:
        """Token ids [N] and the step of these chunks, on the device of the cache."""
        size, device = self.cache.block_size, self.cache.device
        ids = np.fromiter((token for chunk in chunks for token in chunk.token_ids), np.int64)
        counts = np.array([chunk.count for chunk in chunks], np.int64)
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        ends = np.fromiter(accumulate(counts, initial=0), np.int32, len(chunks) + 1)
        rows_N = np.repeat(np.arange(len(chunks)), counts)
        positions = np.arange(len(ids)) - np.repeat(ends[:-1] - starts, counts)
        table = self._tables.rows([chunk.sequence for chunk in chunks], starts // size)
        slots = table[rows_N, positions // size].astype(np.int64) * size + positions % size
        lengths = (starts + counts).astype(np.int32)
        to_device = (torch.from_numpy(x).to(device, non_blocking=True) for x in (ids, positions, slots))
        ids_N, positions_N, slots_N = to_device
        step = PagedStep(
            cache=self.cache,
            positions_BT=positions_N[None],
            slots_N=slots_N,
            block_table_RM=torch.from_numpy(table).to(device, non_blocking=True),
            lengths_R=torch.from_numpy(lengths).to(device, non_blocking=True),
            query_starts=torch.from_numpy(ends).to(device, non_blocking=True),
            max_queries=int(counts.max()),
            num_slots=int(lengths.max()),
        )
        if CHECKING or device.type == "cpu":
            step.check()
        return ids_N, step

    def logits(self, hidden_NC: Tensor, rows: SequenceOf[int]) -> Tensor:
        """fp32 logits [R, V] of some rows of the hidden states."""
        index_R = torch.tensor(rows).to(hidden_NC.device, non_blocking=True)
        return self.model.logits(hidden_NC[index_R])

    def release(self, sequence: Sequence) -> None:
        """The sequence lost its blocks, or ended."""
        self._tables.release(sequence)

    def reset(self) -> None:
        """Forget all tables, as after a step that failed."""
        self._tables.clear()


class BlockTables:
    """The block tables of the running sequences as rows of one array: int32 [max_running, max_blocks]."""

    def __init__(self, max_running: int, max_blocks: int) -> None:
        self._table = np.zeros((max_running, max_blocks), np.int32)
        self._free = list(range(max_running - 1, -1, -1))
        self._row_of: dict[Sequence, int] = {}

    def rows(self, sequences: SequenceOf[Sequence], first_changed: np.ndarray) -> np.ndarray:
        """Their rows, [R, M], a copy. Entries before `first_changed` [R] are as they were at the last call."""
        rows = []
        for sequence, first in zip(sequences, first_changed.tolist(), strict=True):
            row = self._row_of.get(sequence)
            if row is None:
                row = self._row_of[sequence] = self._free.pop()
                first = 0
            blocks = sequence.blocks
            self._table[row, first : len(blocks)] = blocks[first:]
            rows.append(row)
        width = max(len(sequence.blocks) for sequence in sequences)
        return self._table[rows, :width]

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence; one that has no row is passed over."""
        row = self._row_of.pop(sequence, None)
        if row is not None:
            self._free.append(row)

    def clear(self) -> None:
        """Forget every sequence."""
        for sequence in list(self._row_of):
            self.release(sequence)
