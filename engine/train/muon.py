"""Muon: momentum, orthogonalised. For the hidden matrices of a Transformer.

The update of a matrix W [rows, cols] with gradient G is, with momentum m and learning rate lr,

    M <- m M + (1 - m) G                 momentum
    U <- m M + (1 - m) G                 Nesterov: one step ahead
    O <- NewtonSchulz(U)                 nearly the orthogonal factor of U: singular values moved close to 1
    W <- (1 - lr * decay) W - lr * sqrt(max(1, rows / cols)) * O

NewtonSchulz is `trine.kernels.newton_schulz`; its singular values land in about [0.7, 1.2], which serves as well as 1.
It runs in `dtype` (bfloat16 where training does). Every logical matrix (q, k, v, o, gate, up, down of each layer, and
of each expert) is orthogonalised by itself; equal shapes are only batched for speed.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (scale).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from trine.kernels.newton_schulz import newton_schulz

# Matrices orthogonalised in one call: enough to fill the machine, few enough to keep temporaries small.
BATCH_ELEMENTS = 2**22


def update_scale(rows: int, cols: int) -> float:
    """Factor on the orthogonal update: keeps the root-mean-square size of tall matrices' updates."""
    return math.sqrt(max(1.0, rows / cols))


class Muon:
    """Muon over a fixed list of matrices; holds one momentum buffer in each parameter's dtype (fp32).

    `parameters` are [rows, cols], or stacks of such [E, rows, cols], with `.grad` set at each `step`. `dtype` is what
    Newton-Schulz computes in.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.parameters = list(parameters)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dtype = dtype
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._batches = _batches_of_equal_shape(self.parameters)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every matrix at learning rate `lr`."""
        for indices in self._batches:
            weights = [self.parameters[i] for i in indices]
            buffers = [self.buffers[i] for i in indices]
            grads = _gradients(weights)
            torch._foreach_lerp_(buffers, grads, 1.0 - self.momentum)
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            orthogonal = self._orthogonal(ahead)
            if self.weight_decay:
                torch._foreach_mul_(weights, 1.0 - lr * self.weight_decay)
            torch._foreach_add_(weights, orthogonal, alpha=-lr * update_scale(*weights[0].shape[-2:]))

    def _orthogonal(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """Of updates of one shape, some matrices at a time."""
        shape, dtype = updates[0].shape, updates[0].dtype
        batch_BRC = torch.cat([update.to(self.dtype).reshape(-1, *shape[-2:]) for update in updates])
        at_once = max(1, BATCH_ELEMENTS // math.prod(shape[-2:]))
        done_BRC = torch.cat([newton_schulz(some_BRC) for some_BRC in torch.split(batch_BRC, at_once)]).to(dtype)
        return list(done_BRC.view(len(updates), *shape).unbind())


def _batches_of_equal_shape(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the parameters, grouped by shape and cut so that a batch holds at most `BATCH_ELEMENTS`."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        by_shape[parameter.shape].append(index)
    batches = []
    for shape, indices in by_shape.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each parameter; all must have one."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(grads) == len(parameters), "a parameter has no gradient"
    return grads
