"""Distillation: a student learns from a teacher's distribution over the next token, beside the token itself.

    loss = weight T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) (-log p(target))

summed over valid targets. T^2 keeps the gradient of the first part as large as at T = 1. Both models read the same
tokens; the teacher's logits are never whole either.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.data.batch import IGNORED, Batch
from trine.engine.data.objectives import CausalLM
from trine.engine.model.transformer import Transformer
from trine.kernels.cross_entropy.distillation import linear_distillation
from trine.kernels.cross_entropy.op import linear_cross_entropy


class Distillation(CausalLM):
    """See the module. `teacher` has the student's vocabulary, any width, and no gradients; it may be quantized."""

    def __init__(self, teacher: Transformer, *, temperature: float, weight: float) -> None:
        if teacher.training:
            raise ValueError("the teacher is in training mode, so that it would drop numbers; call eval() on it")
        self.teacher, self.temperature, self.weight = teacher, temperature, weight

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """The summed loss (fp32 scalar) and the number of valid targets."""
        places = {"positions_BT": batch.positions_BT, "segment_ids_BT": batch.segment_ids_BT}
        hidden_BTC = model(
            batch.ids_BT, **places, compute_dtype=compute_dtype, checkpoint_activations=checkpoint_activations
        )
        hidden_NC, targets_N = hidden_BTC.flatten(0, 1), batch.targets_BT.flatten()
        with torch.no_grad():
            taught_NE = self.teacher(batch.ids_BT, **places, compute_dtype=compute_dtype).flatten(0, 1)
        loss = self.weight * linear_distillation(
            hidden_NC,
            model.head_weight,
            bias=model.head_bias,
            teacher_hidden=taught_NE,
            teacher_weight=self.teacher.head_weight,
            teacher_bias=self.teacher.head_bias,
            temperature=self.temperature,
            valid=targets_N != IGNORED,
            softcap=model.config.logit_softcap,
            teacher_softcap=self.teacher.config.logit_softcap,
        )
        if self.weight < 1:
            loss = loss + (1 - self.weight) * linear_cross_entropy(
                hidden_NC,
                model.head_weight,
                targets_N,
                bias=model.head_bias,
                ignore_index=IGNORED,
                softcap=model.config.logit_softcap,
            )
        return loss, batch.num_valid
