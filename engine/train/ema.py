"""The exponential moving average (EMA) of the weights, beside those that are trained.

After update number n since averaging began (n = 1, 2, ...), with weights w:

    average <- average + (1 - d) (w - average),   d = min(decay, (1 + n) / (10 + n))

Averaging begins after `warmup_steps` steps; before, the average is the weights themselves. d rises to `decay`, so that
the first weights are soon forgotten. The number n is part of a checkpoint, and d is a function of it alone. Averages
are fp32 and lie where the weights lie. An update is one pass over all parameters: 12 bytes read or written for each.
Of several ranks each averages what it owns (shards.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.train.ranks import Ranks
from trine.engine.train.recipe import EmaSettings
from trine.engine.train.shards import Shards


class Ema:
    """Averages the parameters of a module."""

    def __init__(self, trained: nn.Module, settings: EmaSettings, shards: Shards | None = None) -> None:
        self.settings = settings
        self.updates = 0
        self._shards = shards or Shards(trained, Ranks())
        self._parameters = dict(trained.named_parameters())
        self._averages = {name: self._parameters[name].detach().clone() for name in self._shards.owned}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The weights have made `step` steps."""
        averages, weights = self._lists()
        if step <= self.settings.warmup_steps:
            torch._foreach_copy_(averages, weights)
            return
        self.updates += 1
        decay = min(self.settings.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module has the averages; nothing may train it or save it then.

        No number is copied, but for those that other ranks own.
        """
        weights = {name: parameter.data for name, parameter in self._parameters.items()}
        averages = {
            name: self._averages[name] if name in self._averages else torch.empty_like(weight)
            for name, weight in weights.items()
        }
        self._shards.spread(averages)
        try:
            for name, parameter in self._parameters.items():
                parameter.data = averages[name]
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = weights[name]

    def _lists(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and weights in one order."""
        return list(self._averages.values()), [self._parameters[name].data for name in self._averages]

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name (not copies), of what this rank owns."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Continue from saved averages of all parameters, or begin at the weights where `tensors` is empty.

        Raises `CheckpointError` unless names and shapes are those of the parameters.
        """
        self.updates = updates
        if not tensors:
            torch._foreach_copy_(*self._lists())
            return
        odd = sorted(tensors.keys() ^ self._parameters.keys()) + [
            name for name, tensor in self._averages.items() if name in tensors and tensors[name].shape != tensor.shape
        ]
        if odd:
            raise CheckpointError(
                f"the saved averages do not fit this model: {len(odd)} tensors differ, first {odd[0]!r}; continue with "
                "the recipe they were saved with"
            )
        for name, average in self._averages.items():
            average.copy_(tensors[name])
