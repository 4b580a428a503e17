"""An embedding whose table is codes, in the place of a model's own; a tied output layer multiplies by the same codes.

Only the rows that are looked up become numbers, the same that the dequantized table holds. For the product of the
output layer the codes go through the quantized matmul, as any quantized layer's.

Shapes: V rows, C numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trine.engine.errors import UsageError
from trine.engine.model.layers import Embedding
from trine.kernels.quantized.op import quantized_linear
from trine.kernels.quantized.packing import PackedWeight
from trine.kernels.quantized.rows import packed_rows


class QuantizedEmbedding(nn.Module):
    """Rows of a table [V, C] that is codes, in `dtype`; `layer.to(dtype)` changes what they come in, not the codes."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        return packed_rows(self.weight, ids, self.dtype)

    def product(self, x: Tensor, bias: Tensor | None, *, deterministic: bool = False) -> Tensor:
        """See `Embedding.product`. Raises `UsageError` in the deterministic mode, as every quantized layer."""
        if deterministic:
            raise UsageError("deterministic=True with a quantized model; leave it out, or give the original checkpoint")
        return quantized_linear(x, self.weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        like = fn(torch.empty(0, device=self.device, dtype=self.dtype))
        self.dtype = like.dtype
        if like.device.type != "meta":
            self.weight = self.weight.to(like.device)
        return self

    def extra_repr(self) -> str:
        return f"{type(self.weight).__name__} [{self.weight.num_features}, {self.weight.width}]"


def install_table(model: nn.Module, name: str, weight: PackedWeight) -> None:
    """Replace the `Embedding` of that name by a quantized one with this table."""
    old = model.get_submodule(name)
    assert isinstance(old, Embedding), name
    assert (weight.num_features, weight.width) == tuple(old.weight.shape), name
    model.set_submodule(name, QuantizedEmbedding(weight, old.dtype))
