"""A mixture of experts in the place of a feed-forward layer: every token goes to K of E gated layers.

    ids, weights = route(x gate^T)        y = sum over slots of weight * expert(x)  (+ sigmoid(x s^T) * shared(x))

Experts are stacked: one parameter holds a matrix of each, so that a few products compute all of them.

Shapes: N tokens (any leading dimensions), E experts, K slots, C width, F feed-forward width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trine.engine.model.config import ModelConfig, MoeConfig
from trine.engine.model.layers import Linear
from trine.kernels.mlp.op import CLAMPED
from trine.kernels.moe.op import moe_mlp
from trine.kernels.moe.routing import load_balancing_loss, route, router_z_loss


@dataclass
class RouterWatch:
    """What the routers of a forward pass do: a scalar of each layer with experts, with its graph.

    `balance`: how unevenly experts are chosen, 1 where all are alike (`load_balancing_loss` over K). `z`: the mean
    square of the logits' logsumexp. `busiest`: tokens of the busiest expert over those of an even share.
    `real_BT`, bool, says which tokens count; None for all.
    """

    real_BT: Tensor | None = None
    balance: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    busiest: list[Tensor] = field(default_factory=list)
    is_open: bool = True

    def see(self, logits: Tensor, ids: Tensor) -> None:
        """Logits [..., E] and chosen experts [..., K] of one layer.

        Recomputation in the backward pass must do what the forward pass did, so it is seen too, and left out.
        """
        balance = load_balancing_loss(logits, ids, mask_N=self.real_BT) / ids.shape[-1]
        z = router_z_loss(logits, mask_N=self.real_BT)
        if self.is_open:
            num_experts = logits.shape[-1]
            chosen = ids[..., None] == torch.arange(num_experts, device=ids.device)
            if self.real_BT is not None:
                chosen = chosen & self.real_BT[..., None, None]
            tokens_E = chosen.flatten(0, -2).sum(dim=0)
            self.balance.append(balance)
            self.z.append(z)
            self.busiest.append(tokens_E.max() * num_experts / tokens_E.sum().clamp(min=1))


class ExpertLinear(nn.Module):
    """A linear layer of every expert: `weight` [E, out, in], `bias` [E, out]."""

    def __init__(
        self,
        num_experts: int,
        num_in: int,
        num_out: int,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_out, num_in, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, num_out, device=device, dtype=dtype)) if bias else None


class Experts(nn.Module):
    """The three layers of all experts. Where weights are codes, `quantized/experts.py` stands in its place."""

    def __init__(self, width: int, moe: MoeConfig, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        E, F, bias = moe.num_experts, moe.ffn_width, moe.expert_bias
        self.gate_proj = ExpertLinear(E, width, F, bias=bias, device=device, dtype=dtype)
        self.up_proj = ExpertLinear(E, width, F, bias=bias, device=device, dtype=dtype)
        self.down_proj = ExpertLinear(E, F, width, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, *, activation: str, limit: float | None) -> Tensor:
        """What the chosen experts [..., K] make of x [..., C], times their weights, summed."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return moe_mlp(
            x,
            ids,
            weights,
            gate.weight,
            up.weight,
            down.weight,
            activation=activation,
            gate_bias=gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
            limit=limit,
        )


class MixtureOfExperts(nn.Module):
    """See the module's text. `make_shared` makes the layer that every token goes to, where there is one."""

    def __init__(
        self,
        config: ModelConfig,
        make_shared: Callable[[int], nn.Module],
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe: MoeConfig = config.moe
        self.activation = config.activation if config.moe.limit is None else CLAMPED
        E, C, bias = config.moe.num_experts, config.width, config.moe.router_bias
        self.gate = Linear(C, E, bias=bias, device=device, dtype=dtype)
        self.experts = Experts(C, config.moe, device=device, dtype=dtype)
        shared = config.moe.shared_width
        self.shared_expert = None if shared is None else make_shared(shared)
        self.shared_expert_gate = None if shared is None else Linear(C, 1, bias=False, device=device, dtype=dtype)
        self.watch: RouterWatch | None = None

    def forward(self, x: Tensor, deterministic: bool = False) -> Tensor:
        """Never deterministic: how many tokens an expert has decides how they are summed. The model refuses it."""
        assert not deterministic
        logits = self.gate(x)
        ids, weights = route(logits, self.moe.top_k, order=self.moe.order, renormalise=self.moe.renormalise)
        if self.watch is not None and torch.is_grad_enabled():
            self.watch.see(logits, ids)
        y: Tensor = self.experts(x, ids, weights, activation=self.activation, limit=self.moe.limit)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return y
        shared: Tensor = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y + shared


@contextmanager
def watched_routers(model: nn.Module, real_BT: Tensor | None = None) -> Iterator[RouterWatch]:
    """Within it the forward passes with gradients of a model with experts are seen."""
    watch = RouterWatch(real_BT)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.watch = watch
    yield watch
    watch.is_open = False
