"""Losses of the routers of a mixture of experts, beside any objective.

    gradient of  sum of the objective's losses + N (balance mean_layers(balance_l) + z mean_layers(z_l))

N is the number of the objective's terms, so that after the trainer's division the two weights stand beside a mean loss.
Each layer is balanced by itself over the tokens of a piece (`train.micro_batch_size` sequences), padding left out, with
`balance_l` = 1 where all experts are chosen alike. Without such a loss a few experts take all tokens: whoever is chosen
learns, and is chosen the more.

Sources: Fedus et al., "Switch Transformers" (arXiv 2101.03961), eq. 4; Zoph et al., "ST-MoE" (arXiv 2202.08906), eq. 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.engine.data.objectives import Measuring, Objective
from trine.engine.model.moe import watched_routers
from trine.engine.model.transformer import Transformer


class RouterLosses:
    """An objective that adds the gradients of the routers' losses to those of `inner`, whose loss it shows."""

    def __init__(self, inner: Objective, *, balance: float, z: float) -> None:
        self.inner, self.balance, self.z = inner, balance, z
        self._seen: list[Tensor] = []

    def loss(
        self,
        model: Transformer,
        batch: Any,
        *,
        compute_dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> tuple[Tensor, int]:
        """As `inner` says."""
        with watched_routers(model, batch.real_tokens) as watch:
            loss, count = self.inner.loss(
                model, batch, compute_dtype=compute_dtype, checkpoint_activations=checkpoint_activations
            )
        balance, z = torch.stack(watch.balance).mean(), torch.stack(watch.z).mean()
        self._seen.append(torch.stack([balance.detach(), z.detach(), torch.stack(watch.busiest).max().to(z.dtype)]))
        extra = count * (self.balance * balance + self.z * z)
        return loss + (extra - extra.detach()), count

    def measures(self) -> dict[str, float]:
        """Means over the pieces since the last call, of `expert_balance`, `router_z`, and `busiest_expert`.

        Those of `inner`, where it has any, stand before them.
        """
        means = torch.stack(self._seen).mean(dim=0).tolist() if self._seen else []
        self._seen.clear()
        beside = self.inner.measures() if isinstance(self.inner, Measuring) else {}
        return beside | dict(zip(("expert_balance", "router_z", "busiest_expert"), means, strict=False))
