"""Labelled examples in training order, and for evaluation.

Each epoch visits every example of a source once, in a new order that is a function of the seed, the data and the number
of the epoch; sources are mixed as those of tokens are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trine.engine.data.examples import ExampleSet, Task
from trine.engine.data.permutation import derive_key, permute
from trine.engine.data.stream import MixedSource, SourceFacts, Stream
from trine.engine.errors import UsageError
from trine.engine.log import printable
from trine.engine.text.tokenizer import Tokenizer


class ExampleStream(Stream):
    """Examples of weighted files. Raises `DataError` for what is not right in them, `UsageError` for a limit in tokens.

    `tokenizer_dir` is the folder that `tokenizer` came from.
    """

    def __init__(
        self, sources: Sequence[MixedSource], task: Task, tokenizer: Tokenizer, *, tokenizer_dir: Path, seed: int
    ) -> None:
        for source in sources:
            if source.max_tokens is not None:
                raise UsageError(
                    f"max_tokens = {source.max_tokens} of {source.folder} counts tokens of prepared text, and this "
                    "is a file of examples; give max_epochs"
                )
        self._task = task
        self._sets = [ExampleSet(source.folder, task, tokenizer) for source in sources]
        sizes, tokens = [len(one) for one in self._sets], [one.num_tokens for one in self._sets]
        super().__init__(sources, sizes=sizes, tokens=tokens, step=1, seed=seed)
        self.tokenizer_dir, self.tokenizer_fingerprint = tokenizer_dir, tokenizer.fingerprint
        self.tokens_per_sample = self.num_tokens / max(1, self.samples_per_epoch)
        parts = [(one.fingerprint, source.weight) for one, source in zip(self._sets, sources, strict=True)]
        identity = f"example-stream-1 {parts} {self._limits} {seed}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def batch(self, first_sample: int, count: int) -> Any:
        sources, index = self._assign(first_sample, count)
        numbers = np.empty_like(index)
        for s, one in enumerate(self._sets):
            inside = sources == s
            epochs, places = np.divmod(index[inside], len(one))
            numbers[inside] = [
                int(permute(np.array([place]), len(one), derive_key("epoch", self.seed, s, one.fingerprint, epoch))[0])
                for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
            ]
        return self._task.make([self._sets[s][n] for s, n in zip(sources.tolist(), numbers.tolist(), strict=True)])

    def preview(self, terms: str) -> list[str]:
        """What each source holds, and its first example; `terms`: what the terms of the loss are."""
        lines = []
        for one in self._sets:
            lines.append(f"examples     {one.path}: {len(one)}, {one.num_tokens:,} tokens, {one.num_terms:,} {terms}")
            lines.append(f"the first    {printable(self._task.shown(one[0])).strip()}")
        return lines

    def stamps(self) -> list[list[int]]:
        return [stamp for one in self._sets for stamp in one.stamps]

    def facts(self) -> list[SourceFacts]:
        return [SourceFacts(one.num_tokens, len(one), one.fingerprint) for one in self._sets]

    def verify(self) -> None:
        """Nothing to read again: the fingerprint is of what this process holds."""


class ExampleValidation:
    """Examples for evaluation, in the order of the file; of more than `max_examples` so many, spread evenly.

    Attributes: num_examples, fingerprint.
    """

    def __init__(self, path: Path | str, task: Task, tokenizer: Tokenizer, *, max_examples: int | None = None) -> None:
        self._task = task
        self._set = ExampleSet(path, task, tokenizer)
        self.num_examples = len(self._set) if max_examples is None else min(max_examples, len(self._set))
        self.fingerprint = hashlib.sha256(f"{self._set.fingerprint} {self.num_examples}".encode()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[Any]:
        """All examples, `batch_size` at a time; the last batch may be smaller."""
        numbers = [i * len(self._set) // self.num_examples for i in range(self.num_examples)]
        for first in range(0, len(numbers), batch_size):
            yield self._task.make([self._set[number] for number in numbers[first : first + batch_size]])
