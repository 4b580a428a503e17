"""The methods by name: how codes are found, and whether inputs are rescaled before (`equivalent.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from trine.engine.errors import UsageError
from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.quantize import awq, hqq, smoothquant
from trine.engine.quantize.equivalent import Rescaling
from trine.engine.quantize.gptq import quantize_gptq
from trine.engine.quantize.rtn import quantize_rtn
from trine.engine.quantize.statistics import InputStatistics


class Method(Protocol):
    """From a weight [N, K] to codes; `scale_dtype` None is the weight's. Rows do not depend on each other, but for
    those of one block, so weights on the same input may be given one below the other.
    """

    def __call__(
        self,
        w_NK: Tensor,
        scheme: Scheme,
        statistics: InputStatistics | None = None,
        *,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantizedTensor: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A method as it is chosen. `calibrated`: it needs the statistics of the inputs, as one with a `rescaling` does.

    `misfit`: what is wrong with a scheme for it, or None.
    """

    quantize: Method
    calibrated: bool = False
    rescaling: Rescaling | None = None
    misfit: Callable[[Scheme], str | None] = lambda scheme: None


# Raised whenever a method comes to write other bytes: a run that was interrupted goes on with the same methods only.
REVISION = 2
METHODS: dict[str, Choice] = {
    "rtn": Choice(quantize_rtn),
    "rtn-mse": Choice(partial(quantize_rtn, search="weights")),
    "rtn-weighted": Choice(partial(quantize_rtn, search="inputs"), calibrated=True),
    "hqq": Choice(hqq.quantize_hqq, misfit=hqq.misfit),
    "gptq": Choice(quantize_gptq, calibrated=True),
    "awq": Choice(partial(quantize_rtn, search="outputs"), True, awq.awq_scales, awq.misfit),
    "awq-gptq": Choice(quantize_gptq, True, awq.awq_scales, awq.misfit),
    "smoothquant": Choice(quantize_rtn, True, smoothquant.smooth_scales, smoothquant.misfit),
    "smoothquant-gptq": Choice(quantize_gptq, True, smoothquant.smooth_scales, smoothquant.misfit),
}


def check_pair(method: str, scheme_name: str, scheme: Scheme) -> None:
    """Raises `UsageError` where a method does not fit a scheme."""
    misfit = METHODS[method].misfit(scheme)
    if misfit is not None:
        raise UsageError(f"method {method} does not fit scheme {scheme_name}: {misfit}")


def with_alpha(method: str, alpha: float | None) -> Choice:
    """The method of a name, SmoothQuant with this strength where one is given.

    Raises `UsageError` for another method, and for what lies outside 0 to 1.
    """
    choice = METHODS[method]
    if alpha is None:
        return choice
    if choice.rescaling is not smoothquant.smooth_scales:
        raise UsageError(f"--alpha belongs to smoothquant and smoothquant-gptq; method {method} has none")
    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha is {alpha}; it is a share, from 0 to 1")
    return replace(choice, rescaling=partial(smoothquant.smooth_scales, alpha=alpha))
