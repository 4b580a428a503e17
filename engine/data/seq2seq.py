"""The objective of encoder-decoders: predict each next token of a target from its source and the target before it.

    sum over target tokens of (1 - e) (-log p(token)) + e mean over the vocabulary of -log p(v)       e: label smoothing

The same for pairs of texts and for span corruption, which differ in their data alone. Source: Vaswani et al.,
"Attention Is All You Need" (arXiv 1706.03762), section 5.4; the smoothed part is spread over all tokens, the right one
too, as in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED
from trine.engine.data.seq2seq_batch import Seq2SeqBatch
from trine.engine.model.transformer import Transformer
from trine.kernels.cross_entropy.op import linear_cross_entropy


class Seq2Seq:
    """See the module. Packed rows are computed as their pairs alone would be."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(
        self,
        model: Transformer,
        batch: Seq2SeqBatch,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """The summed loss in nats (fp32 scalar), and the number of target tokens."""
        hidden_BTC = decode(model, batch, compute_dtype=compute_dtype, checkpoint_activations=checkpoint_activations)
        loss = linear_cross_entropy(
            hidden_BTC.flatten(0, 1),
            model.head_weight,
            batch.targets_BT.flatten(),
            bias=model.head_bias,
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
            softcap=model.config.logit_softcap,
        )
        return loss, batch.counts[0]


def decode(
    model: Transformer,
    batch: Seq2SeqBatch,
    *,
    compute_dtype: torch.dtype | None = None,
    checkpoint_activations: bool = False,
) -> Tensor:
    """Hidden states [B, T, C] of the targets."""
    source = model.encode(
        batch.source_ids_BS,
        segment_ids_BS=batch.source_segments_BS,
        positions_BS=batch.source_positions_BS,
        compute_dtype=compute_dtype,
        checkpoint_activations=checkpoint_activations,
    )
    return model(  # type: ignore[no-any-return]
        batch.ids_BT,
        source=source,
        segment_ids_BT=batch.segment_ids_BT,
        positions_BT=batch.positions_BT,
        compute_dtype=compute_dtype,
        checkpoint_activations=checkpoint_activations,
    )
