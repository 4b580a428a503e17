"""Objectives: from a batch and a model to a loss.

An objective returns the sum of the loss over valid tokens and their number, never a mean: the trainer adds up the
sums of all micro-batches (and ranks) of a step and divides once, by the valid tokens of the whole step. One that learns
two things at once returns a sum for each, and each is divided by its own number.

Those of encoders are in `encoder_objectives.py`, that of encoder-decoders in `seq2seq.py`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.model.transformer import Transformer
from trine.kernels.cross_entropy.op import linear_cross_entropy


class Objective(Protocol):
    """What the trainer asks of an objective; `batch` is one that the data was made into for it."""

    def loss(
        self,
        model: Transformer,
        batch: Any,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """The summed losses, a scalar or one for each of `batch.counts`, and how many terms the first one has."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """An objective with figures for the log beside its loss."""

    def measures(self) -> dict[str, float]:
        """Means since the last call, by name."""
        ...


class CausalLM:
    """Predict each next token: the sum over valid targets of -log p(target | tokens before it in its document)."""

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """The summed loss in nats (fp32 scalar) and the number of valid targets. The logits are never whole."""
        hidden_BTC = model(
            batch.ids_BT,
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
            compute_dtype=compute_dtype,
            checkpoint_activations=checkpoint_activations,
        )
        loss = linear_cross_entropy(
            hidden_BTC.flatten(0, 1),
            model.head_weight,
            batch.targets_BT.flatten(),
            bias=model.head_bias,
            ignore_index=IGNORED,
            softcap=model.config.logit_softcap,
        )
        return loss, batch.num_valid
