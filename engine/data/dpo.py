"""Learning from preferences without a reward model (DPO): what is preferred becomes likelier than it was, against the
rest, with respect to where the training began.

    r(y) = beta (log p(y | x) - log p_0(y | x))        m = r(chosen) - r(rejected)
    loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

for a prompt x with the answers y, log-probabilities summed over the tokens of an answer, its end among them; p_0 is the
model that the run began from, and r is called the reward. e, the label smoothing, is the share of pairs that are held
to be the wrong way round.

Sources: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), eq. 7; Mitchell, "A note on DPO with
noisy preferences" (2023), eq. 3.

Shapes: P pairs, M tokens of answers in all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.engine.data.preferences import PreferenceBatch
from trine.engine.model.transformer import Transformer
from trine.kernels.cross_entropy.token_log_probs import token_log_probs

MEASURES = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
Reference = Callable[[Transformer], AbstractContextManager[Transformer]]


class Preference:
    """See the module. `reference(model)` is a context with the model that training began from, in evaluation mode."""

    def __init__(self, *, beta: float, label_smoothing: float = 0.0, reference: Reference) -> None:
        self.beta, self.label_smoothing, self.reference = beta, label_smoothing, reference
        self._seen: list[Tensor] = []

    def loss(
        self,
        model: Transformer,
        batch: PreferenceBatch,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """The summed loss in nats (fp32 scalar), and the number of pairs."""
        rewards_P2 = self.rewards(
            model, batch, compute_dtype=compute_dtype, checkpoint_activations=checkpoint_activations
        )
        self._seen.append(rewards_P2.detach())
        return preference_loss(rewards_P2, self.label_smoothing), batch.counts[0]

    def rewards(
        self,
        model: Transformer,
        batch: PreferenceBatch,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Of the preferred answer and the other one of each pair: fp32 [P, 2]."""
        with torch.no_grad(), self.reference(model) as began:
            before_P2 = answer_log_probs(began, batch, compute_dtype=compute_dtype)
        now_P2 = answer_log_probs(
            model, batch, compute_dtype=compute_dtype, checkpoint_activations=checkpoint_activations
        )
        return self.beta * (now_P2 - before_P2)

    def measures(self) -> dict[str, float]:
        """Means over the pairs since the last call: how many are the right way round, their margins, both rewards."""
        if not self._seen:
            return {}
        found = reward_measures(torch.cat(self._seen))
        self._seen.clear()
        return found


def preference_loss(rewards_P2: Tensor, label_smoothing: float) -> Tensor:
    """The summed loss of pairs of rewards."""
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    return -((1 - label_smoothing) * F.logsigmoid(margins_P) + label_smoothing * F.logsigmoid(-margins_P)).sum()


def reward_measures(rewards_P2: Tensor) -> dict[str, float]:
    """`MEASURES` of some pairs."""
    chosen_P, rejected_P = rewards_P2.unbind(dim=1)
    margins_P = chosen_P - rejected_P
    values = torch.stack([(margins_P > 0).to(margins_P).mean(), margins_P.mean(), chosen_P.mean(), rejected_P.mean()])
    return dict(zip(MEASURES, values.tolist(), strict=True))


def answer_log_probs(
    model: Transformer,
    batch: PreferenceBatch,
    *,
    compute_dtype: torch.dtype | None = None,
    checkpoint_activations: bool = False,
) -> Tensor:
    """The summed log-probabilities of the tokens of each answer: fp32 [P, 2]. The logits are never whole."""
    hidden_BTC = model(
        batch.ids_BT,
        positions_BT=batch.positions_BT,
        segment_ids_BT=batch.segment_ids_BT,
        compute_dtype=compute_dtype,
        checkpoint_activations=checkpoint_activations,
    )
    log_probs_M = token_log_probs(
        hidden_BTC.flatten(0, 1)[batch.places_M],
        model.head_weight,
        batch.targets_M,
        bias=model.head_bias,
        softcap=model.config.logit_softcap,
    )
    numbers = torch.arange(2 * batch.counts[0], device=log_probs_M.device)
    # No scatter: sums in a fixed order, on a GPU too.
    return torch.where(batch.answers_M == numbers[:, None], log_probs_M, 0.0).sum(dim=1).view(-1, 2)
