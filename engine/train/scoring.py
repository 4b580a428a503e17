"""What an evaluation says of a model: the loss, and the scores that belong to the objective.

    causal LM        bits per byte                     masked LM       accuracy of the chosen tokens; of the pairs
    chat             the loss alone                    preference      accuracy, margin and size of rewards
    span corruption  accuracy of the next token        seq2seq         the same; exact matches of generated targets
    classification   accuracy, macro F1                regression      Pearson and Spearman correlation
    tagging          accuracy, macro F1, and F1 of entities where labels mark them (B-, I-)

A `Scorer` takes the batches one by one. Losses are those of the objective without label smoothing, in nats for each
term (a squared error for regression), and without dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.dpo import Preference, preference_loss, reward_measures
from trine.engine.data.encoder_batch import EncoderBatch
from trine.engine.data.encoder_objectives import chosen, class_logits, encode, head_of, spans_of, tag_logits
from trine.engine.data.objectives import CausalLM
from trine.engine.data.preferences import PreferenceBatch
from trine.engine.data.seq2seq import decode
from trine.engine.data.seq2seq_batch import Seq2SeqBatch
from trine.engine.evaluate.scores import entity_f1, macro_f1, mark_entities, pearson, spearman
from trine.engine.generate.seq2seq import greedy_ids
from trine.engine.model.transformer import Transformer

_CHUNK_ROWS = 1024  # of logits over the vocabulary in memory at a time


@dataclass(frozen=True)
class Scores:
    """The summed loss of all terms, their number, and scores by name."""

    total: float
    terms: int
    scores: dict[str, float]


class Scorer(Protocol):
    """Takes batches, then says what came of them all."""

    def add(self, model: Transformer, batch: Any, *, compute_dtype: torch.dtype) -> None: ...

    def result(self) -> Scores: ...


@dataclass
class NextTokenScorer:
    """Loss of each next token."""

    total: float = 0.0
    terms: int = 0

    def add(self, model: Transformer, batch: Batch, *, compute_dtype: torch.dtype) -> None:
        loss_sum, num_valid = CausalLM().loss(model, batch, compute_dtype=compute_dtype)
        self.total += float(loss_sum)
        self.terms += num_valid

    def result(self) -> Scores:
        return Scores(self.total, self.terms, {})


@dataclass
class MaskedScorer:
    """Loss and accuracy of the chosen tokens, and of the pairs where there are any."""

    total: float = 0.0
    terms: int = 0
    hits: int = 0
    pairs: int = 0
    pair_total: float = 0.0
    pair_hits: int = 0

    def add(self, model: Transformer, batch: EncoderBatch, *, compute_dtype: torch.dtype) -> None:
        assert batch.targets_M is not None
        hidden_BTC = encode(model, batch, compute_dtype=compute_dtype)
        total, hits = token_scores(model, chosen(hidden_BTC, batch), batch.targets_M)
        self.total, self.hits, self.terms = self.total + total, self.hits + hits, self.terms + batch.counts[0]
        if batch.labels_B is not None:
            logits_B2 = head_of(model).next_sentence(hidden_BTC, spans_of(batch))
            self.pair_total += float(F.cross_entropy(logits_B2, batch.labels_B, reduction="sum"))
            self.pair_hits += int((logits_B2.argmax(dim=-1) == batch.labels_B).sum())
            self.pairs += len(batch.labels_B)

    def result(self) -> Scores:
        scores = {"accuracy": self.hits / max(1, self.terms)}
        if self.pairs:
            scores["next_sentence_loss"] = self.pair_total / self.pairs
            scores["next_sentence_accuracy"] = self.pair_hits / self.pairs
        return Scores(self.total, self.terms, scores)


@dataclass
class Seq2SeqScorer:
    """Loss and accuracy of target tokens; of the first `exact` pairs, how many targets are generated exactly."""

    exact: int = 0
    total: float = 0.0
    terms: int = 0
    hits: int = 0
    generated: int = 0
    matches: int = 0

    def add(self, model: Transformer, batch: Seq2SeqBatch, *, compute_dtype: torch.dtype) -> None:
        targets_N = batch.targets_BT.flatten()
        valid_N = targets_N != IGNORED
        hidden_NC = decode(model, batch, compute_dtype=compute_dtype).flatten(0, 1)[valid_N]
        total, hits = token_scores(model, hidden_NC, targets_N[valid_N])
        self.total, self.hits, self.terms = self.total + total, self.hits + hits, self.terms + batch.counts[0]
        pairs = list(islice(pairs_of(batch), self.exact - self.generated))
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            # One more than the longest, so that a target that does not end is no match.
            longest = max(map(len, targets)) + 1
            found = greedy_ids(model, sources, max_tokens=longest, compute_dtype=compute_dtype)
            self.matches += sum(ids == target[:-1] for ids, target in zip(found, targets, strict=True))
            self.generated += len(pairs)

    def result(self) -> Scores:
        scores = {"accuracy": self.hits / max(1, self.terms)}
        if self.generated:
            scores["exact_match"] = self.matches / self.generated
        return Scores(self.total, self.terms, scores)


@dataclass
class PreferenceScorer:
    """Loss of pairs of answers, and their rewards."""

    objective: Preference
    rewards: list[Tensor] = field(default_factory=list)

    def add(self, model: Transformer, batch: PreferenceBatch, *, compute_dtype: torch.dtype) -> None:
        self.rewards.append(self.objective.rewards(model, batch, compute_dtype=compute_dtype))

    def result(self) -> Scores:
        rewards_P2 = torch.cat(self.rewards)
        return Scores(float(preference_loss(rewards_P2, 0.0)), len(rewards_P2), reward_measures(rewards_P2))


@dataclass
class ClassScorer:
    """Loss, accuracy and macro F1 of classes, of texts or of words; of words also of the entities that they mark."""

    labels: tuple[str, ...]
    words: bool = False
    total: float = 0.0
    predicted: list[npt.NDArray[np.int64]] = field(default_factory=list)
    true: list[npt.NDArray[np.int64]] = field(default_factory=list)
    rows: list[npt.NDArray[np.int64]] = field(default_factory=list)  # of each word, counted through all batches

    def add(self, model: Transformer, batch: EncoderBatch, *, compute_dtype: torch.dtype) -> None:
        logits_NL = (tag_logits if self.words else class_logits)(model, batch, compute_dtype=compute_dtype)
        targets_N = batch.targets_M if self.words else batch.labels_B
        assert targets_N is not None
        self.total += float(F.cross_entropy(logits_NL, targets_N, reduction="sum"))
        self.predicted.append(logits_NL.argmax(dim=-1).cpu().numpy())
        self.true.append(targets_N.cpu().numpy())
        if self.words:
            assert batch.places_M is not None
            before = self.rows[-1][-1] + 1 if self.rows else 0
            self.rows.append(before + batch.places_M.cpu().numpy() // batch.ids_BT.shape[1])

    def result(self) -> Scores:
        predicted, true = np.concatenate(self.predicted), np.concatenate(self.true)
        scores = {
            "accuracy": float((predicted == true).mean()) if len(true) else 0.0,
            "f1": macro_f1(predicted, true, len(self.labels)),
        }
        if self.words and mark_entities(self.labels):
            borders = np.flatnonzero(np.diff(np.concatenate(self.rows))) + 1
            named = [
                [[self.labels[number] for number in text] for text in np.split(numbers, borders)]
                for numbers in (predicted, true)
            ]
            scores["entity_f1"] = entity_f1(*named)
        return Scores(self.total, len(true), scores)


@dataclass
class NumberScorer:
    """Squared error, and correlation of predicted and true numbers."""

    predicted: list[npt.NDArray[np.float64]] = field(default_factory=list)
    true: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, model: Transformer, batch: EncoderBatch, *, compute_dtype: torch.dtype) -> None:
        assert batch.labels_B is not None
        self.predicted.append(class_logits(model, batch, compute_dtype=compute_dtype)[:, 0].cpu().double().numpy())
        self.true.append(batch.labels_B.cpu().double().numpy())

    def result(self) -> Scores:
        predicted, true = np.concatenate(self.predicted), np.concatenate(self.true)
        scores = {"pearson": pearson(predicted, true), "spearman": spearman(predicted, true)}
        return Scores(float(((predicted - true) ** 2).sum()), len(true), scores)


def token_scores(model: Transformer, hidden_NC: Tensor, targets_N: Tensor) -> tuple[float, int]:
    """Summed loss over the vocabulary, and how many targets are the likeliest token."""
    total, hits = 0.0, 0
    for hidden_nC, targets_n in zip(
        torch.split(hidden_NC, _CHUNK_ROWS), torch.split(targets_N, _CHUNK_ROWS), strict=True
    ):
        logits_nV = model.logits(hidden_nC)
        total += float(F.cross_entropy(logits_nV, targets_n, reduction="sum"))
        hits += int((logits_nV.argmax(dim=-1) == targets_n).sum())
    return total, hits


def pairs_of(batch: Seq2SeqBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Source and target of each pair of a batch, packed or not, end-of-text counted."""
    # Each once, instead of waiting for a device at every row.
    source_ids_BS, targets_BT = batch.source_ids_BS.cpu(), batch.targets_BT.cpu()
    if batch.segment_ids_BT is None or batch.source_segments_BS is None:
        yield from zip(source_ids_BS.tolist(), targets_BT.tolist(), strict=True)
        return
    segment_ids_BT, source_segments_BS = batch.segment_ids_BT.cpu(), batch.source_segments_BS.cpu()
    for source_S, sources_S, target_T, targets_T in zip(
        source_ids_BS, source_segments_BS, targets_BT, segment_ids_BT, strict=True
    ):
        for segment in torch.unique(targets_T[target_T != IGNORED]).tolist():
            yield source_S[sources_S == segment].tolist(), target_T[targets_T == segment].tolist()
