"""GPTQ: columns are rounded one after the other, and those that follow make up for the error of each.

It looks for codes with a small error of the output, sum over tokens |x (w' - w)^T|^2 = tr((w' - w) H (w' - w)^T) T / 2
with H = 2 / T X^T X. With H^-1 = U^T U, U upper triangular, and column k the next to round, of what w has become:

    q_k = round(w_k)        e_k = (w_k - w'_k) / U_kk        w_j -= e_k U_kj   for all j > k

where w'_k is what q_k stands for. Columns j > k within a block of 128 are changed at once, all later ones with one
product when the block is done ("lazy updates"), which gives the same numbers.

Columns are taken in the order of falling H_kk, the largest inputs first, while others are left to make up for them.
Scales and zero points are found before that, from the weight as it is, for the groups that are stored, so the order
leaves no trace in the result ("static" activation order).

U comes from one factorisation: with J the reversal of the order, J H J = L L^T gives H = R R^T with R = J L J upper
triangular, and U = R^-1. H is damped by a part of its mean diagonal, more where it cannot be factored. An input that
was always zero says nothing: its column is rounded to nearest and changes no other.

Rows are independent of each other, so weights that share their input can be given one below the other.

Where ranges are searched for, all scales of row n are then multiplied by w_n H w_n^T / w_n H w'_n^T, so that its output
is no smaller than it was (`rtn.py` says why).

Source: Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1; static order as in llm-compressor's "weight" ordering.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.engine.errors import TrineError
from trine.engine.model.quantized.scheme import BLOCK, Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor, to_groups
from trine.engine.quantize.rtn import Search, find_parameters, product_of, quantized_tensor, round_to_codes
from trine.engine.quantize.statistics import InputStatistics

# Columns of one block of updates.
COLUMNS = 128
# Parts of the mean diagonal that are added to the diagonal, one after the other until H can be factored.
DAMPING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class HessianError(TrineError):
    """The inputs' H cannot be factored at any damping: it holds numbers that are not finite."""


def quantize_gptq(
    w_NK: Tensor,
    scheme: Scheme,
    statistics: InputStatistics | None = None,
    *,
    scale_dtype: torch.dtype | None = None,
    search: Search | None = "inputs",
) -> QuantizedTensor:
    """The weight [N, K] in any float dtype, quantized; scales in `scale_dtype` (None: that of the weight).

    `search`: how ranges are found, as in `rtn.py`. Computed in fp32 (float64 in float64). Raises `HessianError`, and
    ValueError without statistics.
    """
    if statistics is None:
        raise ValueError("GPTQ needs the statistics of the inputs; give calibration data")
    num_features, width = w_NK.shape
    scale_dtype = scale_dtype or w_NK.dtype
    dtype = torch.promote_types(w_NK.dtype, torch.float32)
    hessian_KK = statistics.hessian_KK.to(dtype)
    order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    u_KK = inverse_factor(hessian_KK[order_K][:, order_K])

    groups = to_groups(w_NK.to(dtype), scheme)
    product = None if search is None else product_of(search, scheme, statistics, num_features, dtype)
    scales, zeros = find_parameters(groups, scheme, scale_dtype, product)
    size = BLOCK if scheme.strategy == "block" else scheme.group_size or width
    group_K = (order_K // size).tolist()
    scales_GN, zeros_GN = (_for_rows(one, scheme, num_features) for one in (scales, zeros))

    w_KN = w_NK.to(dtype).t()[order_K]  # columns as rows: contiguous, and a copy that may be changed
    codes_KN = torch.empty_like(w_KN)
    for start in range(0, width, COLUMNS):
        block = slice(start, min(start + COLUMNS, width))
        errors = torch.empty_like(w_KN[block])
        u = u_KK[block, block]
        for i, k in enumerate(range(block.start, block.stop)):
            scale_N, zero_N = scales_GN[group_K[k]], zeros_GN[group_K[k]]
            code_N = codes_KN[k] = round_to_codes(w_KN[k], scale_N, zero_N, scheme)
            error_N = errors[i] = (w_KN[k] - (code_N - zero_N) * scale_N) / u[i, i]
            w_KN[k + 1 : block.stop].addr_(u[i, i + 1 :], error_N, alpha=-1)
        w_KN[block.stop :].addmm_(u_KK[block, block.stop :].t(), errors, alpha=-1)
    codes_NK = codes_KN[order_K.argsort()].t().to(scheme.code_dtype).contiguous()
    del groups, w_KN, codes_KN  # copies of the weight, of which there are enough below
    made = quantized_tensor(codes_NK, scales, zeros, scheme, scale_dtype)
    if search is None:
        return made
    factors = _gains(w_NK.to(dtype), made.dequantize(dtype), hessian_KK, scheme)
    return quantized_tensor(codes_NK, scales * factors[:, None], zeros, scheme, scale_dtype)


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping)^-1. Raises `HessianError`."""
    diagonal_K = hessian_KK.diagonal()
    dead_K = diagonal_K <= 0
    mean = float(diagonal_K.sum() / (~dead_K).sum().clamp(min=1))
    reversed_KK = hessian_KK.flip(0, 1)
    # A dead input has a row and a column of zeros: any number on the diagonal leaves it apart from the others.
    kept_K = torch.where(dead_K, 1.0, diagonal_K).flip(0)
    for part in DAMPING:
        damped_KK = reversed_KK.clone()
        damped_KK.diagonal().copy_(kept_K + part * mean)
        l_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not failed and bool(l_KK.isfinite().all()):
            identity = torch.eye(len(l_KK), dtype=l_KK.dtype, device=l_KK.device)
            u_KK: Tensor = torch.linalg.solve_triangular(l_KK.flip(0, 1), identity, upper=True)
            return u_KK
    raise HessianError("the sums over the inputs cannot be factored, whatever is added to their diagonal")


def _gains(w_NK: Tensor, kept_NK: Tensor, hessian_KK: Tensor, scheme: Scheme) -> Tensor:
    """What makes outputs as large as they were: a factor for each row of scales; 1 where nothing comes out."""
    from_all_NK = w_NK @ hessian_KK
    whole_N, kept_N = (torch.einsum("nk,nk->n", from_all_NK, other) for other in (w_NK, kept_NK))
    if scheme.strategy == "block":
        whole_N, kept_N = (torch.stack([part.sum() for part in torch.split(one, BLOCK)]) for one in (whole_N, kept_N))
    factors = whole_N / kept_N
    return torch.where((factors > 0) & factors.isfinite(), factors, 1.0)


def _for_rows(parameters: Tensor, scheme: Scheme, num_features: int) -> Tensor:
    """[G, N], contiguous: the scales (or zero points) of a column of group g, one for each row."""
    if scheme.strategy == "block":
        parameters = parameters.repeat_interleave(BLOCK, 0)[:num_features]
    return parameters.t().contiguous()
