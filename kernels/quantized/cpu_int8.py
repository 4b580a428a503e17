"""Products of int8 with int8 codes on a CPU: exact sums.

Where compiled loops decode with the weight, it is kept plain, as they read it, and torch's own integer product
multiplies it (from some rows on the CPU's matrix tiles do: `kernels/cpu/byte_tiles.py`). Elsewhere it is kept in
oneDNN's layout alone, for its product of unsigned with signed bytes, if the CPU has instructions for that; without them
it may saturate.

Measured on one core with VNNI at 2048 x 2048 (us; a bf16 product beside), oneDNN's layout against torch's product: 71
against 55 (240) at one row, 72 against 264 (242) at 4, 301 against 471 (697) at 32, 1103 against 1263 (2342) at 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a result that are looked at a time.
_PIECE_NUMBERS = 2**20


def kept_int8(codes_NK: Tensor) -> tuple[Tensor, bool]:
    """int8 codes as `int8_product` wants them: in oneDNN's layout, if the CPU multiplies bytes without saturating.

    With whether they are in that layout. A tensor in it says that its shape is [K, N].
    """
    if 0 in codes_NK.shape or not torch.cpu._is_vnni_supported():
        return codes_NK.contiguous(), False
    return torch.ops.onednn.qlinear_prepack(codes_NK.contiguous(), None), True


def plain_int8(kept: Tensor, num_features: int, width: int) -> Tensor:
    """The codes [N, K] of oneDNN's layout: a product with the identity gives them back."""
    plain_NK = torch.empty(num_features, width, dtype=torch.int8)
    step = max(1, _PIECE_NUMBERS // num_features)
    for first in range(0, width, step):
        columns = torch.arange(first, min(first + step, width))
        one_hot = F.one_hot(columns, width).to(torch.int8)
        plain_NK[:, columns] = int8_product(one_hot, kept, num_features, packed=True).t().to(torch.int8)
    return plain_NK


def int8_product(x_MK: Tensor, codes_NK: Tensor, num_features: int, *, packed: bool) -> Tensor:
    """The exact integer sums, rounded to fp32."""
    if not packed:
        return torch._int_mm(x_MK, codes_NK.t()).float()
    # x + 128 as unsigned bytes, with 128 as their zero.
    unsigned_MK = x_MK.view(torch.uint8).bitwise_xor(128)
    ones, zeros = torch.ones(num_features), torch.zeros(num_features, dtype=torch.int64)
    sums_MN: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        unsigned_MK, 1.0, 128, codes_NK, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums_MN
