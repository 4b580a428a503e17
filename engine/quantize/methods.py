"""The methods by name: from a weight to codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from trine.engine.model.quantized.scheme import Scheme
from trine.engine.model.quantized.tensor import QuantizedTensor
from trine.engine.quantize.rtn import quantize_rtn

Method = Callable[[Tensor, Scheme], QuantizedTensor]

METHODS: dict[str, Method] = {
    "rtn": quantize_rtn,
    "rtn-mse": partial(quantize_rtn, search=True),
}
