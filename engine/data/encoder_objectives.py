"""The objectives of encoders: hidden tokens, what follows what, classes of texts and of words, numbers.

    masked LM        -sum over chosen tokens of log p(token | the row as it is shown)
    next sentence    -sum over rows of log p(label), beside the masked LM
    classification   -sum over texts of log p(label), with label smoothing
    regression        sum over texts of (number - label)^2
    tagging          -sum over first tokens of words of log p(label)

The output layer is applied to the chosen tokens alone, within the chunked loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.engine.data.encoder_batch import EncoderBatch
from trine.engine.model.heads import Head
from trine.engine.model.pooling import Spans
from trine.engine.model.transformer import Transformer
from trine.kernels.cross_entropy.logits import cross_entropy
from trine.kernels.cross_entropy.op import linear_cross_entropy


class MaskedLM:
    """Predict the tokens that were chosen; with `next_sentence` also whether the second text follows the first.

    A row of documents is computed as the documents alone would be.
    """

    def __init__(self, *, next_sentence: bool = False) -> None:
        self.next_sentence = next_sentence

    def loss(
        self,
        model: Transformer,
        batch: EncoderBatch,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """The summed loss in nats (fp32 scalar, or [2] with that of the pairs), and the number of chosen tokens."""
        assert batch.targets_M is not None
        hidden_BTC = encode(model, batch, compute_dtype=compute_dtype, checkpoint_activations=checkpoint_activations)
        loss = linear_cross_entropy(
            model.predicted(chosen(hidden_BTC, batch)), model.head_weight, batch.targets_M, bias=model.head_bias
        )
        if not self.next_sentence:
            return loss, batch.counts[0]
        assert batch.labels_B is not None
        pairs = cross_entropy(head_of(model).next_sentence(hidden_BTC, spans_of(batch)), batch.labels_B)
        return torch.stack([loss, pairs]), batch.counts[0]


class Classification:
    """Predict the class of a text."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, model: Transformer, batch: EncoderBatch, **options: Any) -> tuple[Tensor, int]:
        """The summed loss in nats (fp32 scalar), and the number of texts."""
        assert batch.labels_B is not None
        logits_BL = class_logits(model, batch, **options)
        return cross_entropy(logits_BL, batch.labels_B, label_smoothing=self.label_smoothing), batch.counts[0]


class Regression:
    """Predict the number of a text."""

    def loss(self, model: Transformer, batch: EncoderBatch, **options: Any) -> tuple[Tensor, int]:
        """The summed squares of the errors (fp32 scalar), and the number of texts."""
        assert batch.labels_B is not None
        numbers_B = class_logits(model, batch, **options)[:, 0]
        return F.mse_loss(numbers_B, batch.labels_B.to(numbers_B.dtype), reduction="sum"), batch.counts[0]


class Tagging:
    """Predict the class of each word from its first token."""

    def loss(self, model: Transformer, batch: EncoderBatch, **options: Any) -> tuple[Tensor, int]:
        """The summed loss in nats (fp32 scalar), and the number of words."""
        assert batch.targets_M is not None
        return cross_entropy(tag_logits(model, batch, **options), batch.targets_M), batch.counts[0]


def encode(
    model: Transformer,
    batch: EncoderBatch,
    *,
    compute_dtype: torch.dtype | None = None,
    checkpoint_activations: bool = False,
) -> Tensor:
    """Hidden states [B, T, C] of a batch. Token types of a model that has none are left out, as its tokenizer does."""
    return model(  # type: ignore[no-any-return]
        batch.ids_BT,
        segment_ids_BT=batch.segment_ids_BT,
        positions_BT=batch.positions_BT,
        token_types_BT=batch.token_types_BT if model.config.token_types > 1 else None,
        compute_dtype=compute_dtype,
        checkpoint_activations=checkpoint_activations,
    )


def class_logits(model: Transformer, batch: EncoderBatch, **options: Any) -> Tensor:
    """fp32 logits [B, L] of the texts; of a regression their numbers [B, 1]."""
    return head_of(model).class_logits(encode(model, batch, **options), spans_of(batch))


def tag_logits(model: Transformer, batch: EncoderBatch, **options: Any) -> Tensor:
    """fp32 logits [M, L] of the words."""
    return head_of(model).tag_logits(chosen(encode(model, batch, **options), batch))


def chosen(hidden_BTC: Tensor, batch: EncoderBatch) -> Tensor:
    """The hidden states [M, C] of the tokens that have targets."""
    assert batch.places_M is not None
    return hidden_BTC.flatten(0, 1)[batch.places_M]


def spans_of(batch: EncoderBatch) -> Spans:
    """Where the text of each row lies among all tokens of the batch."""
    assert batch.lengths_B is not None
    rows, length = batch.ids_BT.shape
    return Spans(torch.arange(0, rows * length, length, device=batch.ids_BT.device), batch.lengths_B)


def head_of(model: Transformer) -> Head:
    """The head of an encoder."""
    assert model.head is not None, "a decoder has no head of an encoder"
    return model.head
