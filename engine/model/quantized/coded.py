"""A frozen layer for codes that no kernel multiplies (nf4, fp4): decoded where it is used, forward and backward.

    y = x W^T + b        dx = dy W        W decoded from the stored tensors into the dtype of x, and forgotten again

So an adapter can be trained on such a base in the memory of its codes. For inference the numbers are held instead,
which is quicker (`checkpoint.load_model`).

Source: Dettmers et al., "QLoRA" (arXiv 2305.14314).

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.engine.errors import UsageError
from trine.engine.model.quantized.format import Encoding
from trine.engine.model.quantized.tensor import QuantizedTensor


class CodedLinear(nn.Module):
    """`stored`: the tensors of the file by their names in the encoding. They keep their dtypes in `layer.to(dtype)`."""

    def __init__(self, encoding: Encoding, stored: dict[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.encoding, self.stored, self.bias = encoding, stored, bias

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """W [N, K]."""
        weight = self.encoding.decode(self.stored)
        return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)

    def forward(self, x: Tensor, *, deterministic: bool = False) -> Tensor:
        """Raises `UsageError` in the deterministic mode, as every quantized layer."""
        if deterministic:
            raise UsageError("deterministic=True with a quantized model; leave it out, or give the original checkpoint")
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        some = next(iter(self.stored.values()))
        where = fn(torch.empty(0, device=some.device)).device
        if where.type != "meta":
            self.stored = {name: tensor.to(where) for name, tensor in self.stored.items()}
        return self


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CodedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_in(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight_in(grads[0].dtype), None
