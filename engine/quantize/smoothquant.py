"""SmoothQuant: the largest inputs are made smaller, and the weights that multiply them larger.

    s_k = max |x_k|^a / max_n |w_nk|^(1 - a)

A token's inputs are rounded with one scale, so its largest ones decide what is left of all others; weights have less to
lose. a = 0.5 shares the burden equally; models with large outliers want more (0.85 for Llama 2 and 3). Where none is
given, the a of 0.25, 0.3 ... 0.95, or no s at all, is taken that has the least error of the outputs of all layers on
the same input, for a sample X of its rows, with inputs and weights rounded as the scheme says:

    |R(X / s) Q(W diag(s))^T - X W^T|^2

Source: Xiao et al., SmoothQuant, arXiv:2211.10438, equation 4.

Shapes: N outputs, K inputs, X rows of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import Scheme
from trine.engine.quantize.equivalent import Tie
from trine.engine.quantize.fake import round_activations
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.statistics import InputStatistics

ALPHAS = tuple(i / 20 for i in range(5, 20))
_SMALLEST = 1e-5


def smooth_scales(
    weights: Sequence[Tensor],
    scheme: Scheme,
    statistics: InputStatistics,
    tie: Tie,
    *,
    alpha: float | None = None,
) -> Tensor:
    """s [K] for weights [N, K] on one input; a `Rescaling`. `alpha` None: searched for."""
    w_NK = torch.cat(list(weights))
    w_NK = w_NK.to(torch.promote_types(w_NK.dtype, torch.float32))
    if alpha is not None:
        return _scales(w_NK, statistics, tie, alpha)
    x_XK = statistics.sample_XK.to(w_NK)
    best_K = torch.ones_like(w_NK[0])
    least = _loss(w_NK, best_K, scheme, x_XK)
    for candidate in ALPHAS:
        s_K = _scales(w_NK, statistics, tie, candidate)
        loss = _loss(w_NK, s_K, scheme, x_XK)
        if loss < least:
            best_K, least = s_K, loss
    return best_K


def misfit(scheme: Scheme) -> str | None:
    """What is wrong with a scheme for SmoothQuant."""
    if scheme.activations == "none":
        return "SmoothQuant is for schemes that round activations (w8a8, fp8); use awq or gptq"
    return None


def _scales(w_NK: Tensor, statistics: InputStatistics, tie: Tie, alpha: float) -> Tensor:
    inputs_K, weights_K = statistics.absmax_K.to(w_NK), w_NK.abs().amax(0)
    s_K = inputs_K**alpha / weights_K.clamp(min=_SMALLEST) ** (1 - alpha)
    # An input that was always zero, or that nothing reads, stays as it is.
    return tie(torch.where((inputs_K == 0) | (weights_K == 0), 1.0, s_K).clamp(min=_SMALLEST))


def _loss(w_NK: Tensor, s_K: Tensor, scheme: Scheme, x_XK: Tensor) -> float:
    rounded_NK = quantize_rtn(w_NK * s_K, scheme).dequantize(w_NK.dtype)
    d_XN = round_activations(x_XK / s_K, scheme) @ rounded_NK.t() - x_XK @ w_NK.t()
    return float(d_XN.square().sum(dtype=torch.float64))
