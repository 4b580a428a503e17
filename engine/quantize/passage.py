"""Samples pass through a model whose layers become others one after the other: by quantizing, or by pruning.

    inputs      calibration samples, through the layers as they have become so far
    original    held-out samples, through the layers as they were
    changed     held-out samples, through the layers as they have become

Each layer is entered, changed by whoever walks along, and left. What memory that takes is reckoned before anything
begins; hidden states and statistics wait on the disk where it does not do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import torch

from trine.engine.log import warn
from trine.engine.model.checkpoint import Opened
from trine.engine.quantize.cache_scales import CacheScales
from trine.engine.quantize.kept_statistics import KeptStatistics
from trine.engine.quantize.memory import (
    Budget,
    batch_bytes,
    method_bytes,
    parameter_bytes,
    source_bytes,
    statistics_bytes,
)
from trine.engine.quantize.quality import Quality, compare
from trine.engine.quantize.samples import Batch, Pairs, Samples
from trine.engine.quantize.stream import Stream, num_states
from trine.engine.quantize.walk import NO_TABLES, Tables, Walk
from trine.engine.quantize.work import Work


class Weight(Protocol):
    """A weight [num_features, width] that will be changed; `path` is its name for people."""

    @property
    def path(self) -> str: ...
    @property
    def num_features(self) -> int: ...
    @property
    def width(self) -> int: ...


class Passage:
    """Over an open checkpoint, computing in `dtype`.

    `weights`: those that will be changed, by their layer. `calibrated`: whether that looks at their inputs.
    `work_dtype`: what a layer is held in meanwhile. `number_bytes`: what each number becomes, until the layer is left.
    `tables`: what the embedding and the head become, if they do. `cache_scales`: watch the calibration samples leave.
    """

    def __init__(
        self,
        opened: Opened,
        dtype: torch.dtype,
        calibration: Samples | Pairs | None,
        evaluation: Samples | Pairs | None,
        weights: Mapping[str, Sequence[Weight]],
        budget: Budget,
        work: Work,
        *,
        calibrated: bool,
        work_dtype: torch.dtype,
        number_bytes: int,
        tables: Tables = NO_TABLES,
        cache_scales: CacheScales | None = None,
    ) -> None:
        self.walk = Walk(opened, dtype)
        self._opened, self._weights, self._budget, self._work = opened, weights, budget, work
        self._calibrated, self._work_dtype, self._number_bytes = calibrated, work_dtype, number_bytes
        self._tables, self._cache_scales = tables, cache_scales
        self._calibration, self._evaluation = calibration, evaluation
        self._inputs: Stream | None = None
        self._original: Stream | None = None
        self._changed: Stream | None = None
        self._batch_bytes = 0

    @property
    def parts(self) -> list[str]:
        """The layers to pass, in order."""
        return self.walk.parts

    def start(self) -> None:
        """Reckon the memory, and make room for hidden states. Raises `UsageError` where memory does not do."""
        config = self.walk.model.config
        inputs, held_out = (
            None if samples is None else samples.batches(config) for samples in (self._calibration, self._evaluation)
        )
        self._batch_bytes = self._bytes_of([*(inputs or []), *(held_out or [])])
        self._reckon()
        self._warn_of_few_tokens()
        wanted = {"inputs": inputs, "original": held_out, "changed": held_out}
        streams = {name: batches for name, batches in wanted.items() if batches is not None}
        total = sum(map(num_states, streams.values())) * config.width * self.walk.dtype.itemsize
        folder = None if self._budget.keeps(total) else self._work.aside
        made = {name: Stream(name, batches, config.width, self.walk.dtype, folder) for name, batches in streams.items()}
        self._inputs, self._original, self._changed = (made.get(name) for name in wanted)

    def enter(self, part: str) -> None:
        """Give a layer its memory; samples have come up to it, and held-out ones are through it as it was."""
        original = [] if self._original is None else [self._original]
        if original:
            self.walk.enter(part, original)
        self.walk.enter(part, [stream for stream in self._streams if stream not in original], self._tables)
        self.walk.load(part)
        if self._original is not None:
            self.walk.forward(part, self._original)

    def leave(self, part: str) -> None:
        """Let samples through what the layer has become, and take its memory."""
        if self._inputs is not None:
            scales = self._cache_scales
            with nullcontext() if scales is None else scales.watching(self.walk.model, part):
                self.walk.forward(part, self._inputs)
        if self._changed is not None:
            self.walk.forward(part, self._changed)
        self.walk.finish(part)

    def statistics(self, part: str, wanted: Collection[str]) -> KeptStatistics:
        """Of the inputs of these linear layers of a layer, gathered in as few passes as memory allows."""
        walk, stream = self.walk, self._inputs
        assert stream is not None
        groups = [group for group in walk.shared_inputs(part, stream) if not set(group).isdisjoint(wanted)]
        widths = [walk.width(group[0]) for group in groups]
        passes = self._budget.passes(groups, widths, self._beside_statistics(part))
        kept = KeptStatistics(groups, self._work.aside if len(passes) > 1 else None)
        for some in passes:
            for name, gathered in walk.statistics(part, stream, [group[0] for group in some]).items():
                kept.put(name, gathered)
        return kept

    def quality(self) -> Quality | None:
        """What held-out samples say, once all layers are left; None where there are none."""
        if self._original is None or self._changed is None:
            return None
        self.walk.load_head()
        head_VC = self.walk.head_of(self._tables)
        heads = (self.walk.logits, partial(self.walk.logits, head_VC=head_VC))
        return compare(heads, self._original, self._changed, self.walk.model.config.vocab_size)

    def close(self) -> None:
        """Give hidden states free."""
        for stream in self._streams:
            stream.close()

    @property
    def _streams(self) -> list[Stream]:
        return [stream for stream in (self._inputs, self._original, self._changed) if stream is not None]

    # --- memory -------------------------------------------------------------------------------------------------------

    def _warn_of_few_tokens(self) -> None:
        """A Hessian [K, K] of fewer than K tokens says nothing of most directions."""
        if self._calibration is None or not self._calibrated:
            return
        widest = max((weight for some in self._weights.values() for weight in some), key=lambda weight: weight.width)
        tokens = self._calibration.num_tokens
        if tokens < widest.width:
            warn(
                f"calibration data is {tokens} tokens, less than the {widest.width} inputs of {widest.path}; give more"
            )

    def _reckon(self) -> None:
        """What memory the work will need beside hidden states; refuses what cannot fit, naming it."""
        require, calibrated = self._budget.require, self._calibrated
        inside = {rule.stored for part in self.parts for rule in self.walk.rules_of(part)}
        for rule in self._opened.rules:
            if rule.stored not in inside:
                copies = 4 if rule.stored in self._tables else 2
                require(rule.stored, copies * self._opened.stored[rule.stored].num_bytes + self._batch_bytes)
        for part in self.parts:
            weights = self._weights.get(part, ())
            base = parameter_bytes(self.walk.model.get_submodule(part), self._work_dtype)
            together, statistics, results = dict[int, int](), 0, 0
            for weight in weights:
                together[weight.width] = together.get(weight.width, 0) + weight.num_features
                one = statistics_bytes(weight.width) if calibrated else 0
                statistics += one
                results += self._number_bytes * weight.num_features * weight.width
                alone = method_bytes(weight.num_features, weight.width, calibrated=calibrated)
                require(weight.path, base + one + max(self._batch_bytes, alone))
            largest = max((method_bytes(n, k, calibrated=calibrated) for k, n in together.items()), default=0)
            needed = base + statistics + results + max(self._batch_bytes, largest)
            self._budget.needed = max(self._budget.needed, needed)

    def _beside_statistics(self, part: str) -> int:
        """What is taken while statistics wait to be used: the layer, and what all its weights become."""
        weights = self._weights[part]
        base = parameter_bytes(self.walk.model.get_submodule(part), self._work_dtype)
        alone = max(method_bytes(weight.num_features, weight.width, calibrated=True) for weight in weights)
        results = self._number_bytes * sum(weight.num_features * weight.width for weight in weights)
        return base + results + max(self._batch_bytes, alone)

    def _bytes_of(self, batches: Sequence[Batch]) -> int:
        """Hidden states of the largest batch inside a layer, with those of its sources."""
        config = self.walk.model.config
        inner = max(config.ffn_width, 0 if config.encoder is None else config.encoder.ffn_width)
        tokens = max(batch.ids_BT.numel() for batch in batches)
        sources = max(0 if batch.source_ids_BU is None else batch.source_ids_BU.numel() for batch in batches)
        return batch_bytes(max(tokens, sources), config.width, inner) + source_bytes(sources, config.width)
