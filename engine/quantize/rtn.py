"""Round to nearest: codes from the weights alone, group by group.

Symmetric, with a range r of a group (at first its largest |w|), and [a, b] the smallest and the largest code:

    s = r / ((b - a) / 2)          q = clamp(round(w / s), a, b)

which is r / 7.5 for 4 bits and r / 127.5 for 8; for e4m3 s = r / 448, and rounding is that of e4m3. Asymmetric, with
the range [lo, hi] (at first from the smallest to the largest w, stretched to hold 0):

    s = (hi - lo) / (b - a)        z = clamp(round(a - lo / s), a, b)        q = clamp(round(w / s + z), a, b)

s is rounded to the dtype it is stored in before it is used; rounding is to nearest, ties to even. A group of zeros has
the machine epsilon of that dtype as its scale, and z = 0.

A search takes the ranges t r (or [t lo, t hi]) for t = 1.2, 1.175, 1.15 ... 0.5 and keeps, in each group, the one with
the least error; of equal ones t = 1, or the widest. Cutting off a few large numbers makes all others finer; a range
wider than the numbers' own may meet more of them. With d the error s (q - z) - w of the numbers of a group, and x the
inputs that they are multiplied with, the error is <d, d>, where

    "weights"   <a, b> = sum a_k b_k
    "inputs"    <a, b> = sum a_k b_k mean(x_k^2)              what the output loses if inputs were independent
    "outputs"   <a, b> = mean (sum a_k x_k) (sum b_k x_k)     what it loses: a H b^T / 2; H = 2 mean(x x^T), its block

The codes that were found so then get another scale, with which the group is no smaller than it was:

    s' = <w, w> / <w, q - z>        so that <w, w'> = <w, w>

The scale of the least error, <w, q - z> / <q - z, q - z>, leaves <w, w'> less than <w, w> by just that error: 1 to 3 %
at 4 bits. Unlike the errors of single weights this never averages out. Every layer adds less to the residual stream,
and predictions come out sharper on less; s' costs no more than the square of that share (docs/log.md has figures).

Source: min-max is the rule of the compressed-tensors package; the searches are the usual ones: "MSE", "importance
matrix" (llama.cpp), and the clipping of AWQ (arXiv:2306.00978). Scales that keep <w, w'>: DRIVE (arXiv:2105.08339).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import BLOCK, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor, from_groups, to_groups
from trine.engine.quantize.statistics import InputStatistics

Search = Literal["weights", "inputs", "outputs"]
# From two numbers for each weight to one product for each group: <a, b>.
Product = Callable[[Tensor, Tensor], Tensor]
# Parts of the numbers' own range that the search tries besides the whole, the widest first.
RANGES = tuple(i / 40 for i in range(48, 19, -1) if i != 40)
# Numbers of a weight that are searched at once: their temporary copies stay within a few tens of MiB.
_PIECE = 2**21


def quantize_rtn(
    w_NK: Tensor,
    scheme: Scheme,
    statistics: InputStatistics | None = None,
    *,
    scale_dtype: torch.dtype | None = None,
    search: Search | None = None,
) -> QuantizedTensor:
    """The weight [N, K] in any float dtype, quantized; scales in `scale_dtype` (None: that of the weight).

    Computed in fp32 (float64 in float64), some rows at a time. Expects finite weights and whole groups
    (`Scheme.check_shape`). Raises ValueError for a search that needs statistics and has none.
    """
    scale_dtype = scale_dtype or w_NK.dtype
    rows = max(1, _PIECE // (BLOCK * w_NK.shape[1])) * BLOCK
    pieces = [_quantize(piece, scheme, statistics, scale_dtype, search) for piece in torch.split(w_NK, rows)]
    return pieces[0] if len(pieces) == 1 else join(pieces)


def find_parameters(
    groups: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    product: Product | None,
) -> tuple[Tensor, Tensor]:
    """(scales, zero points) to find the codes of groups (`to_groups`) with, in their dtype; None: no search."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales, zeros = range_parameters(low, high, scheme, scale_dtype)
    if product is None:
        return scales, zeros
    error = dequantized(groups, scales, zeros, scheme).sub_(groups)
    least = product(error, error)
    for part in RANGES:
        other, other_zeros = range_parameters(part * low, part * high, scheme, scale_dtype)
        error = dequantized(groups, other, other_zeros, scheme).sub_(groups)
        found = product(error, error)
        better = found < least
        least, scales = torch.where(better, found, least), torch.where(better, other, scales)
        zeros = torch.where(better, other_zeros, zeros)
    return scales, zeros


def without_shrinking(
    groups: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, product: Product, scale_dtype: torch.dtype
) -> Tensor:
    """Scales with which codes found with `scales` leave each group as large as it was; see the module.

    A group of which nothing is left, or that meets nothing but zeros, keeps its own.
    """
    whole, kept = product(groups, groups), product(groups, codes - zeros[..., None])
    found = (whole / kept).to(scale_dtype).to(scales.dtype)
    return torch.where((found > 0) & found.isfinite(), found, scales)


def product_of(
    search: Search, scheme: Scheme, statistics: InputStatistics | None, num_features: int, dtype: torch.dtype
) -> Product:
    """What a search measures errors with, for the groups of a weight of so many rows.

    Raises ValueError for a search that needs statistics and has none.
    """
    if search == "weights":
        return lambda a, b: (a * b).sum(-1)
    if statistics is None:
        raise ValueError(f"a search by {search} needs the statistics of the inputs; give calibration data")
    hessian_KK = statistics.hessian_KK
    width = len(hessian_KK)
    if search == "inputs" or scheme.strategy == "block":  # a block holds rows of several outputs
        mean_K = hessian_KK.diagonal().to(dtype)
        rows = num_features if scheme.strategy == "block" else 1
        weights = to_groups(mean_K.expand(rows, width), scheme)
        return lambda a, b: (a * b * weights).sum(-1)
    size = scheme.group_size or width
    blocks = torch.stack([hessian_KK[i : i + size, i : i + size] for i in range(0, width, size)]).to(dtype)
    return lambda a, b: ((a.transpose(0, 1) @ blocks) * b.transpose(0, 1)).sum(-1).t()


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


def round_to_codes(x: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Codes of numbers whose scales and zero points lie beside them or broadcast, as numbers in their dtype."""
    scaled = (x / scales + zeros).clamp_(*scheme.limits)
    return scaled.round_() if scheme.kind == "int" else scaled.to(scheme.code_dtype).to(x.dtype)


def dequantized(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """What is left of the numbers of each group."""
    codes = round_to_codes(groups, scales[..., None], zeros[..., None], scheme)
    return codes.sub_(zeros[..., None]).mul_(scales[..., None])


def quantized_tensor(
    codes_NK: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> QuantizedTensor:
    """Numbers found, as they are kept."""
    kept = None if scheme.symmetric else zeros.to(torch.int8)
    return QuantizedTensor(scheme, codes_NK.to(scheme.code_dtype), scales.to(scale_dtype), kept)


def join(pieces: list[QuantizedTensor]) -> QuantizedTensor:
    """Weights one below the other as one; the opposite of `QuantizedTensor.split`."""
    zeros = [piece.zeros_NG for piece in pieces if piece.zeros_NG is not None]
    return QuantizedTensor(
        pieces[0].scheme,
        torch.cat([piece.codes_NK for piece in pieces]),
        torch.cat([piece.scales for piece in pieces]),
        torch.cat(zeros) if zeros else None,
    )


def _quantize(
    w_NK: Tensor,
    scheme: Scheme,
    statistics: InputStatistics | None,
    scale_dtype: torch.dtype,
    search: Search | None,
) -> QuantizedTensor:
    groups = to_groups(w_NK.to(torch.promote_types(w_NK.dtype, torch.float32)), scheme)
    product = None if search is None else product_of(search, scheme, statistics, len(w_NK), groups.dtype)
    scales, zeros = find_parameters(groups, scheme, scale_dtype, product)
    codes = round_to_codes(groups, scales[..., None], zeros[..., None], scheme)
    if product is not None:
        scales = without_shrinking(groups, codes, scales, zeros, product, scale_dtype)
    return quantized_tensor(from_groups(codes, scheme, *w_NK.shape), scales, zeros, scheme, scale_dtype)
