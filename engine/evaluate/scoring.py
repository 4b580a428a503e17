"""Log-likelihoods of continuations: log p(continuation | context) under a model, and whether it is what it would say.

    score(context, continuation) = sum over the continuation's tokens of log p(token | everything before it)
    greedy                       = each of these tokens is the likeliest at its place

Requests that feed the model the same tokens (the choices "A", "B", "C" after one question) are computed once. The rest
goes through the model in batches of like length, the longest first, padded on the right, where causal attention does
not see it. What is longer than the context loses its beginning. Logits are formed for scored positions alone, a few
rows at a time; sums are in float64.

Shapes: B sequences, T their tokens, C width, N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trine.engine.errors import ContextLengthError, DataError, NonFiniteError
from trine.engine.generate.logprobs import CHUNK_BYTES
from trine.engine.model.transformer import Transformer

# Padded tokens in one forward pass: enough rows for fast products, few enough for a laptop's memory.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids: those that are given, at least one, and those that are scored, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, slots=True)
class Score:
    """The natural logarithm of the continuation's probability; whether each of its tokens is the likeliest."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class Fed:
    """Tokens that the model is fed, and the pairs that are scored on them: (number of the pair, its continuation)."""

    ids: tuple[int, ...]
    pairs: list[tuple[int, Sequence[int]]] = field(default_factory=list)


class Progress(Protocol):
    """Shows a sequence being worked through, as `trine.engine.log.progress` does."""

    def __call__(self, items: Iterable[list[Fed]], *, total: int, what: str) -> Iterable[list[Fed]]: ...


def score(
    model: Transformer,
    pairs: Sequence[Pair],
    *,
    max_length: int | None = None,
    progress: Progress | None = None,
    what: str = "scoring",
) -> Iterator[tuple[int, Score]]:
    """(number of the pair, its score), batch by batch, in the order in which they are computed.

    Args:
        model: on any device, in evaluation mode; it computes in the dtype of its parameters.
        pairs: see `Pair`.
        max_length: tokens the model is fed at most; default its context. A longer context loses its beginning.
        progress: shown over the batches.
        what: the name under which it is shown.

    Raises:
        ContextLengthError: a continuation alone is longer than that.
        DataError: a context or continuation without tokens.
        NonFiniteError: a score is not a number.
    """
    longest = model.config.max_positions if max_length is None else max_length
    batches = make_batches(_sequences(pairs, longest), TOKENS_PER_BATCH)
    shown: Iterable[list[Fed]] = batches
    if progress is not None:
        shown = progress(batches, total=len(batches), what=what)
    for batch in shown:
        yield from _scores(model, batch)


def make_batches(sequences: Iterable[Fed], tokens_per_batch: int) -> list[list[Fed]]:
    """Sequences by length, the longest first, in batches of at most so many tokens with their padding."""
    batches: list[list[Fed]] = []
    for one in sorted(sequences, key=lambda one: -len(one.ids)):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= tokens_per_batch:
            batches[-1].append(one)
        else:
            batches.append([one])
    return batches


def _sequences(pairs: Sequence[Pair], longest: int) -> Iterable[Fed]:
    """What has to be computed, each of it once."""
    found: dict[tuple[int, ...], Fed] = {}
    for number, pair in enumerate(pairs):
        if not pair.context or not pair.continuation:
            missing = "continuation" if pair.context else "context"
            raise DataError(f"request {number + 1} has a {missing} without tokens; there is nothing to score")
        if len(pair.continuation) > longest:
            raise ContextLengthError(
                f"request {number + 1} has a continuation of {len(pair.continuation)} tokens, more than the "
                f"{longest} that the model is fed at once; shorten it"
            )
        ids = (*pair.context, *pair.continuation)[-(longest + 1) : -1]
        found.setdefault(ids, Fed(ids)).pairs.append((number, pair.continuation))
    return found.values()


@torch.inference_mode()
def _scores(model: Transformer, batch: Sequence[Fed]) -> list[tuple[int, Score]]:
    lengths = [len(one.ids) for one in batch]
    ids_BT = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
    for row, one in enumerate(batch):
        ids_BT[row, : lengths[row]] = torch.tensor(one.ids)
    lengths_B = torch.tensor(lengths, device=model.device)
    hidden_BTC = model(ids_BT.to(model.device), lengths_B=lengths_B)
    # One stretch of rows for each pair: the positions before its continuation's tokens.
    stretches = [
        (number, row, lengths[row] - len(targets), targets)
        for row, one in enumerate(batch)
        for number, targets in one.pairs
    ]
    rows_NC = torch.cat([hidden_BTC[row, start : lengths[row]] for _, row, start, _ in stretches])
    targets_N = torch.tensor([token for *_, targets in stretches for token in targets], device=model.device)
    log_probs_N, likeliest_N = _of_tokens(model, rows_NC, targets_N)
    scores, at = [], 0
    for number, _, _, targets in stretches:
        end = at + len(targets)
        value = log_probs_N[at:end].sum().item()
        if not math.isfinite(value):
            raise NonFiniteError(f"a log-likelihood is {value}; the weights are damaged, or try --dtype float32")
        scores.append((number, Score(value, bool(likeliest_N[at:end].all()))))
        at = end
    return scores


def _of_tokens(model: Transformer, hidden_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of each target its log-probability (float64, on the CPU), and whether it is the likeliest token."""
    rows = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    log_probs, likeliest = [], []
    for hidden, targets in zip(torch.split(hidden_NC, rows), torch.split(targets_N, rows), strict=True):
        logits_RV = model.logits(hidden)
        likeliest.append(logits_RV.argmax(-1) == targets)
        log_probs.append(logits_RV.log_softmax(-1).gather(1, targets[:, None])[:, 0].double())
    return torch.cat(log_probs).cpu(), torch.cat(likeliest).cpu()
