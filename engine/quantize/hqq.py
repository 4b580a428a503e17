"""HQQ: scales and zero points from the weights alone, for an error that lets a few numbers be far off.

The error of a group is sum |w - w'|^p with p = 0.7, which, unlike squares, is least where most numbers are met closely
and outliers are given up. Half-quadratic splitting puts e in the place of w - w' and alternates, from the ranges of
round to nearest on, with b growing by 1.01 from 10 and errors in units of the first scale:

    e = shrink(w - w') = sign(w - w') max(0, |w - w'| - |w - w'|^(p - 1) p / b)
    z = mean(q - (w - e) / s)                               the zero point that fits w - e best; 0 where symmetric
    s = sum (w - e) (q - z) / sum (q - z)^2                 the scale that does

The best of 20 steps is kept for each group. Its codes then get the scale with which the group is no smaller than it was
(`rtn.py`): giving up outliers makes it smaller than squares do. The paper moves z alone; but formats store it as an
integer, to which it is rounded here at every step, and an integer hardly moves, so the scale takes the same
least-squares step.

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import BLOCK, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor, from_groups, to_groups
from trine.engine.quantize.rtn import (
    dequantized,
    find_parameters,
    join,
    product_of,
    quantized_tensor,
    round_to_codes,
    without_shrinking,
)
from trine.engine.quantize.statistics import InputStatistics

NORM, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20
_PIECE = 2**21


def quantize_hqq(
    w_NK: Tensor,
    scheme: Scheme,
    statistics: InputStatistics | None = None,
    *,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """The weight [N, K] in any float dtype, quantized; scales in `scale_dtype` (None: that of the weight).

    Computed in fp32 (float64 in float64), some rows at a time. The statistics are not read.
    """
    scale_dtype = scale_dtype or w_NK.dtype
    rows = max(1, _PIECE // (BLOCK * w_NK.shape[1])) * BLOCK
    return join([_quantize(piece, scheme, scale_dtype) for piece in torch.split(w_NK, rows)])


def misfit(scheme: Scheme) -> str | None:
    """What is wrong with a scheme for HQQ."""
    return None if scheme.kind == "int" else "HQQ is for integer codes; use rtn, rtn-mse or gptq"


def shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal step of |x|^p, approximately: small numbers become 0, large ones hardly change."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12) ** (NORM - 1) * (NORM / beta)).clamp(min=0)


def _quantize(w_NK: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    groups = to_groups(w_NK.to(torch.promote_types(w_NK.dtype, torch.float32)), scheme)
    product = product_of("weights", scheme, None, len(w_NK), groups.dtype)
    scales, zeros = find_parameters(groups, scheme, scale_dtype, product)
    unit = scales[..., None]
    best_scales, best_zeros = scales, zeros
    least = _error(groups, scales, zeros, scheme, unit)
    for step in range(STEPS):
        codes = round_to_codes(groups, scales[..., None], zeros[..., None], scheme)
        rest = (groups - (codes - zeros[..., None]) * scales[..., None]) / unit
        wanted = groups - shrink(rest, BETA * GROWTH**step) * unit
        if not scheme.symmetric:
            zeros = (codes - wanted / scales[..., None]).mean(-1).round().clamp(*scheme.limits)
        steps = codes - zeros[..., None]
        fitted = ((wanted * steps).sum(-1) / steps.square().sum(-1)).to(scale_dtype).to(groups.dtype)
        scales = torch.where(fitted > 0, fitted, scales)  # a group of zeros, and one that lost all its numbers, stays
        error = _error(groups, scales, zeros, scheme, unit)
        better = error < least
        least, best_scales = torch.where(better, error, least), torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    codes = round_to_codes(groups, best_scales[..., None], best_zeros[..., None], scheme)
    scales = without_shrinking(groups, codes, best_scales, best_zeros, product, scale_dtype)
    return quantized_tensor(from_groups(codes, scheme, *w_NK.shape), scales, best_zeros, scheme, scale_dtype)


def _error(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, unit: Tensor) -> Tensor:
    return ((dequantized(groups, scales, zeros, scheme) - groups) / unit).abs().pow(NORM).sum(-1)
