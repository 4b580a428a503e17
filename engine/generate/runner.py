"""One forward pass over a plan of the scheduler: pieces of prompts and single tokens of many sequences, end to end.

The runner owns what lies on the device: the pools of the key/value cache and, on a GPU, the captured graphs of decoding
steps. Block tables are kept between steps and only what changed is written.

Shapes: N tokens of R chunks, C width, V vocabulary, S slots of a block, M entries of a table row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trine.engine.generate.batch_sampler import take_rows
from trine.engine.generate.cpu_step import CpuDecoder, make_decoder
from trine.engine.generate.graphs import Array, DecodeGraphs, Late
from trine.engine.generate.plan import Chunk, Plan
from trine.engine.generate.sequence import PENDING, Sequence
from trine.engine.generate.sources import Sources
from trine.engine.log import format_duration, say, say_once
from trine.engine.model.adapters import NO_ADAPTER, AdapterBank
from trine.engine.model.paged_cache import PagedCache, PagedStep
from trine.engine.model.transformer import Transformer
from trine.kernels.hardware import CHECKING


@dataclass(frozen=True, slots=True)
class Computed:
    """Hidden states [N, C] of all tokens of a step, or their logits [N, V], which a step that only decodes makes.

    The next step may overwrite both.
    """

    hidden_NC: Tensor | None = None
    logits_NV: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Unread:
    """Tokens of the step before that lie on the device and that the host has not read: `PENDING` in their sequences.

    `tokens_R`: int64. `rows`: which of them is the last of a sequence.
    """

    tokens_R: Tensor
    rows: dict[Sequence, int]


class Runner:
    """A model over its paged cache.

    Args:
        model: in evaluation mode.
        cache: its pools; their dtype is the compute dtype, or a quantized one.
        max_running: sequences that hold blocks at one time, at most.
        max_tokens: tokens a sequence can have.
        compute_dtype: of the activations.
        decode_steps: compute steps that only decode by captured graphs (GPU) or compiled loops (CPU), where that works.
        deterministic: see `Transformer.forward`.
        source_tokens: of an encoder-decoder, source tokens that are encoded together.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        *,
        max_running: int,
        max_tokens: int,
        compute_dtype: torch.dtype,
        decode_steps: bool = True,
        deterministic: bool = False,
        source_tokens: int = 0,
    ) -> None:
        self.model = model
        self.cache = cache
        self.compute_dtype = compute_dtype
        self.deterministic = deterministic
        self.adapters = AdapterBank(model, compute_dtype)
        self._tables = BlockTables(max_running, -(-max_tokens // cache.block_size))
        self._decoder: DecodeGraphs | CpuDecoder | None = None
        self._sources = None if model.encoder is None else Sources(model, compute_dtype, source_tokens)
        self._switches = model.config.rope_switch is not None
        if self._sources is not None and cache.device.type == "cuda":
            say_once("decoding runs operation by operation: its steps know no sources")
        elif self._switches and cache.device.type == "cuda":
            say_once("decoding runs operation by operation: this model's rotation changes with the length of a text")
        elif decode_steps and cache.device.type == "cuda":
            self._decoder = DecodeGraphs(
                self._decode, cache, max_rows=max_running, max_tokens=max_tokens, deterministic=deterministic
            )
        elif decode_steps and not deterministic:
            self._decoder = make_decoder(model, cache, compute_dtype)

    @property
    def has_decoder(self) -> bool:
        """Whether decoding steps are captured or compiled."""
        return self._decoder is not None

    @property
    def num_decode_steps(self) -> int:
        """Kinds of decoding steps that were captured or compiled; 0 where the forward computes them."""
        return 0 if self._decoder is None else self._decoder.num_kinds

    def prepare(self) -> None:
        """Capture the graphs of all decoding steps that can come, where steps are captured, and say what it took."""
        if isinstance(self._decoder, DecodeGraphs):
            began = time.monotonic()
            self._decoder.capture_all()
            say(f"captured {self._decoder.num_kinds} decoding steps in {format_duration(time.monotonic() - began)}")

    def forward(self, plan: Plan, unread: Unread | None = None) -> Computed:
        """Copy the plan's blocks and compute its tokens, those of `unread` where a sequence ends in one of them."""
        for sequence in plan.preempted:
            self._tables.release(sequence)
        self.cache.copy_blocks(plan.copies)
        arrays = self._arrays(plan.chunks, unread)
        # Graphs and compiled loops know nothing of adapters.
        adapted = any(chunk.sequence.adapter != NO_ADAPTER for chunk in plan.chunks)
        decodes = all(chunk.count == 1 and chunk.samples for chunk in plan.chunks)
        if self._decoder is not None and decodes and not adapted:
            inputs = (arrays.ids, arrays.positions, arrays.slots, arrays.table, arrays.lengths)
            if isinstance(self._decoder, DecodeGraphs):
                return Computed(logits_NV=self._decoder.run(*inputs, late=arrays.late))
            source = None if self._sources is None else self._sources.of(plan.chunks)
            return Computed(logits_NV=self._decoder.run(*inputs, longer=arrays.longer, source=source))
        ids_N, step = self._step(arrays)
        with self.adapters.tokens(self._adapter_ids(plan.chunks)) if adapted else nullcontext():
            return Computed(self._hidden(ids_N[None], step, plan.chunks))

    def logits(self, computed: Computed, rows: SequenceOf[int]) -> Tensor:
        """fp32 logits [R, V] of some rows of a step."""
        if computed.logits_NV is not None:
            return computed.logits_NV  # every row of a step that only decodes samples
        assert computed.hidden_NC is not None
        return self._logits(take_rows(computed.hidden_NC, rows))

    def _hidden(self, ids_1N: Tensor, step: PagedStep, chunks: SequenceOf[Chunk] = ()) -> Tensor:
        self.cache.step = step
        hidden_1NC: Tensor = self.model(
            ids_1N,
            source=None if self._sources is None else self._sources.of(chunks),
            cache=self.cache,
            compute_dtype=self.compute_dtype,
            deterministic=self.deterministic,
        )
        return hidden_1NC[0]

    def _logits(self, hidden_NC: Tensor) -> Tensor:
        return self.model.logits(hidden_NC, deterministic=self.deterministic)

    def _decode(self, ids_1R: Tensor, step: PagedStep) -> Tensor:
        return self._logits(self._hidden(ids_1R, step))

    def _arrays(self, chunks: SequenceOf[Chunk], unread: Unread | None) -> _Arrays:
        """A plan's chunks as arrays, end to end."""
        size = self.cache.block_size
        ids = np.fromiter((token for chunk in chunks for token in chunk.token_ids), np.int64)
        counts = np.array([chunk.count for chunk in chunks], np.int64)
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        ends = np.fromiter(accumulate(counts, initial=0), np.int32, len(chunks) + 1)
        rows_N = np.repeat(np.arange(len(chunks)), counts)
        positions = np.arange(len(ids)) - np.repeat(ends[:-1] - starts, counts)
        table = self._tables.rows([chunk.sequence for chunk in chunks], starts // size)
        slots = table[rows_N, positions // size].astype(np.int64) * size + positions % size
        late = None
        if unread is not None:
            rows = np.full(len(ids), -1)
            for place in np.flatnonzero(ids == PENDING).tolist():
                rows[place] = unread.rows[chunks[rows_N[place]].sequence]
            late = Late(unread.tokens_R, rows)
            if self.cache.device.type == "cpu":
                ids, late = late.put(torch.from_numpy(ids), torch.from_numpy(rows)).numpy(), None
        longer = np.repeat([chunk.sequence.longer for chunk in chunks], counts) if self._switches else None
        lengths = (starts + counts).astype(np.int32)
        return _Arrays(ids, positions, slots, table, lengths, ends, int(counts.max()), late, longer)

    def _adapter_ids(self, chunks: SequenceOf[Chunk]) -> Tensor:
        """The slot of each token's adapter: int32 [N]."""
        slots = np.array([chunk.sequence.adapter for chunk in chunks], np.int32)
        ids = np.repeat(slots, [chunk.count for chunk in chunks])
        return torch.from_numpy(ids).to(self.cache.device, non_blocking=True)

    def _step(self, arrays: _Arrays) -> tuple[Tensor, PagedStep]:
        """Token ids [N] and the step, on the device of the cache."""
        device = self.cache.device

        def on_device(x: Array) -> Tensor:
            return torch.from_numpy(x).to(device, non_blocking=True)

        step = PagedStep(
            cache=self.cache,
            positions_BT=on_device(arrays.positions)[None],
            slots_N=on_device(arrays.slots),
            block_table_RM=on_device(arrays.table),
            lengths_R=on_device(arrays.lengths),
            query_starts=on_device(arrays.ends),
            max_queries=arrays.longest_chunk,
            num_slots=int(arrays.lengths.max()),
            deterministic=self.deterministic,
            longer_N=None if arrays.longer is None else on_device(arrays.longer),
        )
        if CHECKING or device.type == "cpu":
            step.check()
        ids_N = on_device(arrays.ids)
        return ids_N if arrays.late is None else arrays.late.put(ids_N, on_device(arrays.late.rows)), step

    def release(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self._tables.release(sequence)
        if self._sources is not None:
            self._sources.release(sequence)

    def reset(self) -> None:
        """Forget all tables, as after a step that failed."""
        self._tables.clear()


@dataclass(frozen=True, slots=True)
class _Arrays:
    """ids, positions, slots [N]; table [R, M]; lengths [R], ends [R + 1]: as of `PagedStep`. `late`: ids to come."""

    ids: Array
    positions: Array
    slots: Array
    table: Array
    lengths: Array
    ends: Array
    longest_chunk: int
    late: Late | None
    longer: Array | None


class BlockTables:
    """The block tables of the running sequences as rows of one array: int32 [max_running, max_blocks].

    Only what may have changed is written: a block that was full when a sequence was computed last stays in its place.
    """

    def __init__(self, max_running: int, max_blocks: int) -> None:
        self._table = np.zeros((max_running, max_blocks), np.int32)
        self._free = list(range(max_running - 1, -1, -1))
        self._rows: dict[Sequence, tuple[int, int]] = {}  # the row, and how many of its entries cannot change

    def rows(self, sequences: SequenceOf[Sequence], full: Array) -> Array:
        """Their rows, [R, M], a copy. `full` [R]: blocks of each that are full before this step."""
        rows = []
        for sequence, count in zip(sequences, full.tolist(), strict=True):
            row, kept = self._rows.get(sequence) or (self._free.pop(), 0)
            self._table[row, kept : len(sequence.blocks)] = sequence.blocks[kept:]
            self._rows[sequence] = row, count
            rows.append(row)
        width = max(len(sequence.blocks) for sequence in sequences)
        return self._table[rows, :width]

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence; one that has no row is passed over."""
        known = self._rows.pop(sequence, None)
        if known is not None:
            self._free.append(known[0])

    def clear(self) -> None:
        """Forget every sequence."""
        for sequence in list(self._rows):
            self.release(sequence)
