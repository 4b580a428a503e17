"""Requests for vectors: texts in, one embedding or one row of logits for each, computed whole and without a cache.

A step takes whole sequences, as many as its budget of tokens holds (`scheduler.py`). On a GPU they lie end to end in
one ragged forward; on a CPU, where attention over a ragged row costs the square of its length, sequences of like length
are padded to one batch. Both are what each text gives alone, up to the rounding of products of other sizes.

Shapes: B rows, T tokens, N tokens of all sequences, R sequences, D numbers of a vector, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trine.engine.errors import ContextLengthError, UsageError
from trine.engine.generate.records import Output, PoolingRequest
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import Sequence
from trine.engine.model.pooling import Spans, packed_spans, pool
from trine.engine.model.transformer import Transformer

# A padded batch may hold so many places for each token.
MAX_PADDING = 1.15


def pools(model: Transformer) -> bool:
    """Whether the model gives vectors: an encoder, or a decoder whose folder says how to pool it."""
    return model.head is not None


class Pooler:
    """What an engine needs to answer `PoolingRequest`s.

    Args:
        model: one that pools, in evaluation mode, in the dtype it computes in.
        vocab_size: ids of the tokenizer.
    """

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        self._model = model
        self._packs = model.device.type != "cpu"
        self._vocab_size = vocab_size
        self._token_types: dict[Sequence, tuple[int, ...]] = {}
        self._open: Counter[str] = Counter()  # inputs of each request that have not ended

    def add(self, request: PoolingRequest, scheduler: Scheduler) -> None:
        """Queue its inputs; it changes nothing where it raises.

        Raises `UsageError` for a request without input, an input without ids, ids or token types that do not exist,
        `ContextLengthError` for an input longer than the model takes, `QueueFullError` where too many wait.
        """
        self._check(request)
        sequences = [
            Sequence(
                id=f"{request.id}/{number}",
                request_id=request.id,
                choice=number,
                tokens=list(ids),
                num_prompt=len(ids),
                max_total_tokens=len(ids),
                priority=request.priority,
                pools=True,
            )
            for number, ids in enumerate(request.inputs)
        ]
        scheduler.add(*sequences)
        self._open[request.id] = len(sequences)
        if request.token_types is not None:
            self._token_types.update(zip(sequences, request.token_types, strict=True))

    def knows(self, request_id: str) -> bool:
        """Whether the request is under way."""
        return request_id in self._open

    def release(self, sequence: Sequence) -> None:
        """Forget an input that was computed or aborted."""
        self._token_types.pop(sequence, None)
        self._open[sequence.request_id] -= 1
        if not self._open[sequence.request_id]:
            del self._open[sequence.request_id]

    def compute(self, sequences: SequenceOf[Sequence]) -> list[Output]:
        """The outputs of sequences of one step; a vector with a number that is not finite fails alone."""
        outputs = []
        for batch in self._batches(sequences):
            ids = [sequence.tokens for sequence in batch]
            types = [self._token_types.get(sequence, (0,) * len(sequence.tokens)) for sequence in batch]
            given = types if any(sequence in self._token_types for sequence in batch) else None
            outputs += [_output(*each) for each in zip(batch, self.vectors(ids, given), strict=True)]
        return outputs

    def vectors(
        self, inputs: SequenceOf[SequenceOf[int]], token_types: SequenceOf[SequenceOf[int]] | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """One forward over whole sequences: float32 [D] of each, of a tagger [T, L]."""
        lengths = [len(ids) for ids in inputs]
        if self._packs:
            arrays, spans = _packed(inputs, token_types, self._model.device, causal=self._model.config.causal)
        else:
            arrays, spans = _padded(inputs, token_types)
        hidden_BTC = self._model(**arrays)
        head = self._model.head
        assert head is not None
        if head.config.task == "tagging":
            logits_ML = head.tag_logits(hidden_BTC).flatten(0, -2).float().cpu().numpy()
            T = hidden_BTC.shape[1]
            starts = accumulate(lengths[:-1], initial=0) if self._packs else range(0, len(lengths) * T, T)
            return [logits_ML[begin : begin + length] for begin, length in zip(starts, lengths, strict=True)]
        if head.config.task == "classification":
            vectors_RD = head.class_logits(hidden_BTC, spans)
        elif head.config.embedding is not None:
            vectors_RD = head.embeddings(hidden_BTC, spans)
        else:
            vectors_RD = pool(hidden_BTC, spans, ("mean",))
        return list(vectors_RD.float().cpu().numpy())

    def _batches(self, sequences: SequenceOf[Sequence]) -> Iterator[list[Sequence]]:
        if self._packs:
            yield list(sequences)
            return
        batch: list[Sequence] = []
        tokens = 0
        for sequence in sorted(sequences, key=lambda each: len(each.tokens)):
            length = len(sequence.tokens)
            if batch and (len(batch) + 1) * length > MAX_PADDING * (tokens + length):
                yield batch
                batch, tokens = [], 0
            batch.append(sequence)
            tokens += length
        yield batch

    def _check(self, request: PoolingRequest) -> None:
        if not request.inputs:
            raise UsageError("the request has no input; give at least one text")
        size, longest = self._vocab_size, self._model.config.max_positions
        for number, ids in enumerate(request.inputs):
            if not ids:
                raise UsageError(f"input {number} has no tokens; give at least one")
            if len(ids) > longest:
                raise ContextLengthError(
                    f"input {number} has {len(ids)} tokens but the model takes {longest}; shorten it"
                )
            if not 0 <= min(ids) <= max(ids) < size:
                wrong = next(token for token in ids if not 0 <= token < size)
                raise UsageError(f"input {number} holds id {wrong}; the vocabulary ends at {size - 1}")
        if request.token_types is None:
            return
        if [len(types) for types in request.token_types] != [len(ids) for ids in request.inputs]:
            raise UsageError("token_types do not fit the inputs; give one for each id")
        known = self._model.config.token_types
        wrong = max(max(types) for types in request.token_types)
        if wrong >= known or min(min(types) for types in request.token_types) < 0:
            raise UsageError(f"token_types hold {wrong}, but the model has {known} token types; leave them out")


def _padded(
    inputs: SequenceOf[SequenceOf[int]], token_types: SequenceOf[SequenceOf[int]] | None
) -> tuple[dict[str, Any], Spans]:
    """Rows of one length, padded at their end, and no mask where nothing is padded."""
    length_R = torch.tensor([len(ids) for ids in inputs])
    T = int(length_R.max())
    arrays: dict[str, Any] = {"ids_BT": _rows(inputs, T)}
    if token_types is not None:
        arrays["token_types_BT"] = _rows(token_types, T)
    if int(length_R.min()) < T:
        arrays["mask_BT"] = torch.arange(T) < length_R[:, None]
    return arrays, Spans(torch.arange(len(inputs)) * T, length_R)


def _rows(values: SequenceOf[SequenceOf[int]], T: int) -> Tensor:
    rows = np.zeros((len(values), T), np.int64)
    for row, each in zip(rows, values, strict=True):
        row[: len(each)] = each
    return torch.from_numpy(rows)


def _packed(
    inputs: SequenceOf[SequenceOf[int]],
    token_types: SequenceOf[SequenceOf[int]] | None,
    device: torch.device,
    *,
    causal: bool,
) -> tuple[dict[str, Any], Spans]:
    """One row of all sequences end to end. An encoder finds the positions of each by itself."""
    lengths = [len(ids) for ids in inputs]
    arrays: dict[str, Any] = {
        "ids_BT": _end_to_end(inputs, device),
        "segment_ids_BT": _end_to_end([[number] * length for number, length in enumerate(lengths)], device),
    }
    if causal:
        arrays["positions_BT"] = _end_to_end([range(length) for length in lengths], device)
    if token_types is not None:
        arrays["token_types_BT"] = _end_to_end(token_types, device)
    return arrays, packed_spans(lengths, device=device)


def _end_to_end(values: SequenceOf[SequenceOf[int]], device: torch.device) -> Tensor:
    joined = np.concatenate([np.asarray(each, np.int64) for each in values])
    return torch.from_numpy(joined).to(device, non_blocking=True)[None]


def _output(sequence: Sequence, vector: npt.NDArray[np.float32]) -> Output:
    finite = bool(np.isfinite(vector).all())
    return Output(
        request_id=sequence.request_id,
        choice=sequence.choice,
        text="",
        token_ids=(),
        prompt_tokens=len(sequence.tokens),
        completion_tokens=0,
        cached_tokens=0,
        finish_reason="stop" if finite else "error",
        error=None if finite else "the model gave numbers that are not finite for this input",
        vector=vector if finite else None,
    )
