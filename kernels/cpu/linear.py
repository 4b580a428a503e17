"""Linear layers with plain weights on a CPU, for inference: a weight kept in the form whose products were measured
fastest for 1 to 64 rows.

That is oneDNN's own layout where the table (`table.py`) finds it fastest for most of these numbers of rows, and the
plain weight elsewhere, with which `matvec.py` chooses between compiled loops and torch by the number of rows. Only one
form is kept.

Shapes: M rows, K inputs, N outputs. Bytes: N K b for weights of b bytes; 2 M N K FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels.cpu.matvec import matvec
from trine.kernels.cpu.measured import ROWS
from trine.kernels.cpu.table import choose

_PATHS = ("loops", "torch", "packed")
_MOST_ROWS = 64
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class KeptLinear:
    """A weight [N, K] made by `keep_linear`; `packed`: it is in oneDNN's layout."""

    weight: Tensor
    num_features: int
    width: int
    packed: bool

    def plain(self) -> Tensor:
        """The weight [N, K] as `keep_linear` got it."""
        dense: Tensor = self.weight.to_dense() if self.packed else self.weight
        return dense


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies by weights of fp32 or bf16 in its own layout here."""
    available = torch.backends.mkldnn.is_available()
    return available and (dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def prefers_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN's layout is the fastest for most numbers of rows up to 64, and can be had."""
    if not can_pack(dtype):
        return False
    few = [rows for rows in ROWS if rows <= _MOST_ROWS]
    chosen = [choose(_DTYPES[dtype], rows, _PATHS) for rows in few]
    return 2 * chosen.count("packed") > len(few)


def keep_linear(weight_NK: Tensor) -> KeptLinear:
    """The weight for `linear`. Raises ValueError unless it is fp32 or bf16 [N, K] on a CPU, without a gradient."""
    if weight_NK.dim() != 2 or weight_NK.dtype not in _DTYPES or weight_NK.device.type != "cpu":
        raise ValueError(
            f"weight is {weight_NK.dtype} {tuple(weight_NK.shape)} on {weight_NK.device}; expected float32 or bfloat16 "
            "[N, K] on a CPU"
        )
    if weight_NK.requires_grad:
        raise ValueError("weight requires a gradient, which a kept one has not; give weight.detach()")
    num_features, width = weight_NK.shape
    if 0 in weight_NK.shape or not prefers_packed(weight_NK.dtype):
        return KeptLinear(weight_NK.contiguous(), num_features, width, False)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), 1)
    return KeptLinear(packed, num_features, width, True)


def linear(x_MK: Tensor, kept: KeptLinear, bias_N: Tensor | None = None) -> Tensor:
    """x w^T + bias in the dtype of x, which is the weight's.

    Raises ValueError for what does not fit, and where a gradient is wanted.
    """
    if x_MK.dim() != 2 or x_MK.shape[1] != kept.width or x_MK.dtype != kept.weight.dtype:
        raise ValueError(
            f"x is {x_MK.dtype} {tuple(x_MK.shape)}; expected {kept.weight.dtype} [M, {kept.width}], as the weight is"
        )
    if bias_N is not None and tuple(bias_N.shape) != (kept.num_features,):
        raise ValueError(f"bias has shape {tuple(bias_N.shape)}; expected ({kept.num_features},)")
    if torch.is_grad_enabled() and (x_MK.requires_grad or (bias_N is not None and bias_N.requires_grad)):
        raise ValueError("x or the bias requires a gradient, which a kept weight has not; use torch.no_grad()")
    if not kept.packed:
        return matvec(x_MK, kept.weight, bias_N)
    return packed_product(x_MK, kept.weight, None if bias_N is None else bias_N.to(x_MK.dtype))


def packed_product(x_MK: Tensor, packed: Tensor, bias_N: Tensor | None) -> Tensor:
    """x w^T + bias of a weight in oneDNN's layout, in the dtype that all have."""
    y_MN: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK.contiguous(), packed, bias_N, "none", [], "")
    return y_MN
