"""The small parts of a Transformer: linear, embedding and normalisation layers that cast their weights where used.

Parameters may be kept in fp32 while activations run in bf16: every use casts the weight to the dtype of its input, so
that the dtype of each product is written in the code and never depends on an ambient autocast. New layers hold
uninitialised memory; `init.py` or a checkpoint fills it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.engine.model.config import ModelConfig
from trine.kernels import joined
from trine.kernels.invariant.op import invariant_matmul
from trine.kernels.layer_norm import add_layer_norm, layer_norm
from trine.kernels.rms_norm import add_rms_norm, rms_norm


class Linear(nn.Module):
    """y = x weight^T + bias, in the dtype of x. `weight` is [out, in], as on disk."""

    def __init__(
        self, num_in: int, num_out: int, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_out, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor, *, deterministic: bool = False) -> Tensor:
        """`deterministic`: the bits of a row are those it has alone."""
        return (invariant_matmul if deterministic else joined.linear)(x, self.weight, self.bias)


def joined_linear(x: Tensor, *layers: Linear) -> Tensor:
    """The outputs of several layers on the same input, side by side in the last dimension; for training."""
    return joined.joined_linear(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def records_gradients(layer: nn.Module) -> bool:
    """Whether a product with this layer's weight will be differentiated; only a `Linear` has a weight that can be."""
    return torch.is_grad_enabled() and isinstance(layer, Linear) and layer.weight.requires_grad


class Embedding(nn.Module):
    """Rows of a table. `weight` is [rows, width]."""

    def __init__(self, num_rows: int, width: int, *, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, device=device, dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def product(self, x: Tensor, bias: Tensor | None, *, deterministic: bool = False) -> Tensor:
        """x weight^T + bias: what a tied output layer computes; otherwise as `Linear`."""
        return (invariant_matmul if deterministic else joined.linear)(x, self.weight, bias)


class RMSNorm(nn.Module):
    """See `trine.kernels.rms_norm`. `unit_offset`: multiply by 1 + weight."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + branch, x + branch)."""
        return add_rms_norm(x, branch, self.weight, self.eps, unit_offset=self.unit_offset)


class LayerNorm(nn.Module):
    """See `trine.kernels.layer_norm`."""

    def __init__(
        self, width: int, eps: float, *, bias: bool = True, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + branch, x + branch)."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """LayerNorm of each head under a weight of its own, without bias: x [..., H, D], `weight` [H, D]. In fp32."""

    def __init__(
        self, num_heads: int, head_dim: int, eps: float, *, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()).to(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(
    config: ModelConfig, width: int | None = None, *, device: torch.device | str | None, dtype: torch.dtype
) -> Norm:
    """The normalisation that `config.norm` names, over `width` numbers (default: the model's)."""
    width = width or config.width
    if config.norm in ("rms", "rms_offset"):
        offset = config.norm == "rms_offset"
        return RMSNorm(width, config.norm_eps, unit_offset=offset, device=device, dtype=dtype)
    return LayerNorm(width, config.norm_eps, bias=config.norm == "layer", device=device, dtype=dtype)
