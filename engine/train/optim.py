"""The optimizer of a run: which parameter is updated by what.

Every parameter belongs to exactly one group:

    muon       matrices inside the layers, with optim.name = "muon"          Muon, muon_lr, muon_weight_decay
    decay      other matrices: embeddings and head; with "adamw" all of them AdamW, lr, weight_decay
    no_decay   norms and biases                                              AdamW, lr, no decay

State is fp32 (AdamW's moments 8-bit with optim.state_dtype = "int8") and is saved by parameter name, so that it does
not depend on the order or grouping of parameters, nor on how many ranks share them (shards.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trine.engine.errors import CheckpointError
from trine.engine.train.adamw import AdamW
from trine.engine.train.muon import Muon
from trine.engine.train.recipe import OptimSettings

DEFAULT_MUON_LR = 0.02
DEFAULT_MUON_MOMENTUM = 0.95
_LAYERS = ("layers.", "encoder.layers.")
_ROUTERS = (".mlp.gate.weight", ".shared_expert_gate.weight")
_HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")  # of two dimensions where each head has its own


@dataclass(frozen=True)
class ParameterGroups:
    """Parameters by name, each in exactly one group."""

    muon: dict[str, nn.Parameter] = field(default_factory=dict)
    decay: dict[str, nn.Parameter] = field(default_factory=dict)
    no_decay: dict[str, nn.Parameter] = field(default_factory=dict)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], *, muon: bool) -> ParameterGroups:
    """Sort parameters into groups by name and number of dimensions.

    Muon takes the matrices of the layers, those of every expert too, but not routers, whose rows are independent.
    """
    groups = ParameterGroups()
    for name, parameter in named:
        if parameter.dim() < 2 or name.endswith((".bias", *_HEAD_NORMS)):
            groups.no_decay[name] = parameter
        elif muon and name.startswith(_LAYERS) and not name.endswith(_ROUTERS):
            groups.muon[name] = parameter
        else:
            groups.decay[name] = parameter
    return groups


class Optimizer:
    """AdamW, or Muon and AdamW together, over the parameters of one model, or those of them that are `owned`.

    `muon_dtype` is what Muon's Newton-Schulz computes in. `seed` decides how 8-bit states are rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimSettings,
        *,
        muon_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        owned: Collection[str] | None = None,
    ) -> None:
        self.settings = settings
        named = dict(model.named_parameters())
        self._all = parameter_groups(named.items(), muon=settings.name == "muon")
        mine = named if owned is None else {name: named[name] for name in owned}
        self.groups = parameter_groups(mine.items(), muon=settings.name == "muon")
        self.adamw = AdamW(self.groups.decay, self.groups.no_decay, settings, seed=seed)
        self.muon: Muon | None = None
        if settings.name == "muon":
            momentum, decay = settings.muon_momentum, settings.muon_weight_decay
            self.muon = Muon(
                list(self.groups.muon.values()),
                momentum=DEFAULT_MUON_MOMENTUM if momentum is None else momentum,
                weight_decay=settings.weight_decay if decay is None else decay,
                dtype=muon_dtype,
            )
        self.updates = 0

    def learning_rates(self, factor: float) -> dict[str, float]:
        """The rates at a schedule factor: `lr` (AdamW), and `muon_lr` where Muon is used."""
        rates = {"lr": factor * self.settings.lr}
        if self.muon is not None:
            rates["muon_lr"] = factor * (self.settings.muon_lr or DEFAULT_MUON_LR)
        return rates

    def step(self, factor: float) -> None:
        """One update from the gradients in `.grad`, with all learning rates times `factor`."""
        rates = self.learning_rates(factor)
        self.updates += 1
        self.adamw.step(rates["lr"], update=self.updates)
        if self.muon is not None:
            self.muon.step(rates["muon_lr"])

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as `adamw.exp_avg.NAME`, `adamw.exp_avg_sq.NAME`, `muon.momentum.NAME` (not copies).

        8-bit moments are codes, with `adamw.exp_avg_scale.NAME` and `adamw.exp_avg_sq_scale.NAME` beside them.
        """
        tensors = self.adamw.state_tensors()
        if self.muon is not None:
            for name, buffer in zip(self.groups.muon, self.muon.buffers, strict=True):
                tensors[f"muon.momentum.{name}"] = buffer
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Continue from saved state of all parameters after `updates` updates.

        Raises `CheckpointError` unless keys and shapes match.
        """
        expected = self.state_tensors()
        odd = sorted(self._all_names() ^ tensors.keys()) + [
            name for name, tensor in expected.items() if name in tensors and tensors[name].shape != tensor.shape
        ]
        if odd:
            raise CheckpointError(
                f"the saved optimizer state does not fit this model and optimizer: {len(odd)} tensors differ, "
                f"first {odd[0]!r}; continue with the recipe it was saved with"
            )
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
        self.updates = updates

    def _all_names(self) -> set[str]:
        """Keys of the state of all parameters, owned or not."""
        kinds = ["exp_avg", "exp_avg_sq"]
        if self.settings.state_dtype == "int8":
            kinds += ["exp_avg_scale", "exp_avg_sq_scale"]
        names = {f"adamw.{kind}.{name}" for kind in kinds for name in (*self._all.decay, *self._all.no_decay)}
        return names | {f"muon.momentum.{name}" for name in self._all.muon}
