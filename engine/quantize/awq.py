"""AWQ: weights that multiply large inputs are made larger before they are rounded, so that rounding loses less of them.

    s_k = mean |x_k|^r / (mean_n (|w_nk| / max |w of its group|)^(1 - r) + 1e-4),  divided by sqrt(max s min s)

r is searched for on a grid of 20 numbers from 0 on, with and without the part that depends on the weights, for the
least error of the outputs of all layers that share the input, on a sample X of its rows:

    |X (Q(W diag(s)) / s - W)^T|^2        Q: round to nearest, ranges from the smallest and the largest weight

No s at all (s = 1) is tried too. The ranges of the scaled weights are then cut off where the output's error falls by it
("clipping": the search "outputs" of `rtn.py`).

Source: Lin et al., AWQ, arXiv:2306.00978; grid and normalisation as in the authors' code.

Shapes: N outputs, K inputs, X rows of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import Scheme
from trine.engine.quantize.equivalent import Tie
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.statistics import InputStatistics

GRID = 20
_SMALLEST = 1e-4


def awq_scales(weights: Sequence[Tensor], scheme: Scheme, statistics: InputStatistics, tie: Tie) -> Tensor:
    """s [K] for weights [N, K] on one input; a `Rescaling`. Never worse than 1 on the sample."""
    w_NK = torch.cat(list(weights))
    w_NK = w_NK.to(torch.promote_types(w_NK.dtype, torch.float32))
    x_XK = statistics.sample_XK.to(w_NK)
    best_K = torch.ones_like(w_NK[0])
    least = _loss(w_NK, best_K, scheme, x_XK)
    for s_K in _candidates(w_NK, scheme, statistics, tie):
        loss = _loss(w_NK, s_K, scheme, x_XK)
        if loss < least:
            best_K, least = s_K, loss
    return best_K


def misfit(scheme: Scheme) -> str | None:
    """What is wrong with a scheme for AWQ."""
    if scheme.kind != "int" or scheme.activations != "none":
        return "AWQ is for integer weights with activations as they come; use smoothquant or gptq"
    return None


def _candidates(w_NK: Tensor, scheme: Scheme, statistics: InputStatistics, tie: Tie) -> Iterator[Tensor]:
    inputs_K = statistics.absmean_K.to(w_NK).clamp(min=_SMALLEST)
    groups = w_NK.abs().view(len(w_NK), -1, scheme.group_size or w_NK.shape[1])
    weights_K = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)).mean(0).flatten()
    for both in (True, False):
        for i in range(0 if both else 1, GRID):
            r = i / GRID
            s_K = inputs_K**r / (weights_K ** (1 - r) + _SMALLEST) if both else inputs_K**r
            s_K = tie(s_K.clamp(min=_SMALLEST))
            yield s_K / (s_K.max() * s_K.min()).sqrt()


def _loss(w_NK: Tensor, s_K: Tensor, scheme: Scheme, x_XK: Tensor) -> float:
    d_NK = quantize_rtn(w_NK * s_K, scheme).dequantize(w_NK.dtype).div_(s_K).sub_(w_NK)
    return float((x_XK @ d_NK.t()).square().sum(dtype=torch.float64))
