"""Round to nearest: codes from the weights alone, group by group.

Symmetric, with a range r of a group (at first its largest |w|), and [a, b] the smallest and the largest code:

    s = r / ((b - a) / 2)          q = clamp(round(w / s), a, b)

which is r / 7.5 for 4 bits and r / 127.5 for 8; for e4m3 s = r / 448, and rounding is that of e4m3. Asymmetric, with
the range [lo, hi] (at first from the smallest to the largest w, stretched to hold 0):

    s = (hi - lo) / (b - a)        z = clamp(round(a - lo / s), a, b)        q = clamp(round(w / s + z), a, b)

s is rounded to the dtype it is stored in before it is used; rounding is to nearest, ties to even. A group of zeros has
the machine epsilon of that dtype as its scale, and z = 0.

`search` takes the ranges t r (or [t lo, t hi]) for t = 1, 0.975, 0.95 ... 0.5 and keeps, in each group, the one with
the least sum of (w - s (q - z))^2; of equal ones the widest. Cutting off a few large numbers makes all others finer.

Source: min-max is the rule of the compressed-tensors package; the search is the usual one over ranges ("MSE").
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor, from_groups, to_groups

# Parts of the largest range that the search tries, the widest first.
RANGES = tuple(1 - i / 40 for i in range(21))


def quantize_rtn(
    w_NK: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype | None = None, search: bool = False
) -> QuantizedTensor:
    """The weight [N, K] in any float dtype, quantized; scales in `scale_dtype` (None: that of the weight).

    Computed in fp32 (float64 in float64). Expects finite weights and whole groups (`Scheme.check_shape`).
    """
    scale_dtype = scale_dtype or w_NK.dtype
    groups = to_groups(w_NK.to(torch.promote_types(w_NK.dtype, torch.float32)), scheme)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales, zeros = range_parameters(low, high, scheme, scale_dtype)
    if search:
        least = _error(groups, scales, zeros, scheme)
        for part in RANGES[1:]:
            other, other_zeros = range_parameters(part * low, part * high, scheme, scale_dtype)
            error = _error(groups, other, other_zeros, scheme)
            better = error < least
            least, scales = torch.where(better, error, least), torch.where(better, other, scales)
            zeros = torch.where(better, other_zeros, zeros)
    codes = from_groups(round_to_codes(groups, scales, zeros, scheme), scheme, *w_NK.shape)
    kept = None if scheme.symmetric else zeros.to(torch.int8)
    return QuantizedTensor(scheme, codes.to(scheme.code_dtype), scales.to(scale_dtype), kept)


def range_parameters(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scales, zero points) of ranges [low, high], in their dtype; scales hold what `scale_dtype` keeps of them."""
    smallest, largest = scheme.limits
    if scheme.symmetric:
        scales = torch.maximum(-low, high) / ((largest - smallest) / 2)
    else:
        scales = (high - low) / (largest - smallest)
    scales = scales.to(scale_dtype).to(low.dtype)
    empty = scales == 0
    scales = torch.where(empty, torch.finfo(scale_dtype).eps, scales)
    zeros = torch.zeros_like(scales)
    if not scheme.symmetric:
        zeros = torch.where(empty, zeros, (smallest - low / scales).clamp(smallest, largest).round())
    return scales, zeros


def round_to_codes(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Codes of the numbers of each group, as numbers in their dtype."""
    scaled = (groups / scales[..., None] + zeros[..., None]).clamp(*scheme.limits)
    return scaled.round() if scheme.kind == "int" else scaled.to(scheme.code_dtype).to(groups.dtype)


def _error(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    codes = round_to_codes(groups, scales, zeros, scheme)
    return ((codes - zeros[..., None]) * scales[..., None] - groups).square().sum(-1)
