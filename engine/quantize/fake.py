"""Fake quantization: numbers rounded as a scheme stores them, but kept as numbers, with gradients to train through.

    forward   w -> s (q - z), the ranges found anew each time by round to nearest (`rtn.py`)
              x -> the codes of each token times their scale, where the scheme quantizes activations
    backward  the gradient passes as if nothing had been rounded ("straight through")

What is trained so and then quantized by the method "rtn" is, to the bit, what was trained, provided that the weight is
stored in the dtype it had here.

Source: Bengio et al., arXiv:1308.3432; Jacob et al., arXiv:1712.05877.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.engine.model.quantized.scheme import Scheme
from trine.engine.quantize.rtn import quantize_rtn
from trine.kernels.quantized.op import quantize_rows


def fake_quantize_weight(w_NK: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype | None = None) -> Tensor:
    """w [N, K] as it will be after quantizing, in its dtype; scales as `scale_dtype` keeps them (None: that of w)."""
    return _StraightThrough.apply(w_NK, round_weight(w_NK.detach(), scheme, scale_dtype))  # type: ignore[no-any-return,no-untyped-call]


def fake_quantize_activations(x: Tensor, scheme: Scheme) -> Tensor:
    """x [..., K] as the layers of a scheme round it; x itself where they take it as it comes."""
    if scheme.activations == "none":
        return x
    return _StraightThrough.apply(x, round_activations(x.detach(), scheme))  # type: ignore[no-any-return,no-untyped-call]


def round_weight(w_NK: Tensor, scheme: Scheme, scale_dtype: torch.dtype | None = None) -> Tensor:
    """What is left of w [N, K], in its dtype."""
    return quantize_rtn(w_NK, scheme, scale_dtype=scale_dtype).dequantize(w_NK.dtype)


def round_activations(x: Tensor, scheme: Scheme) -> Tensor:
    """What is left of x [..., K], in its dtype; found in fp32, as the products of quantized weights do."""
    if scheme.activations == "none":
        return x
    rows = quantize_rows(x.float(), scheme.code_dtype, blocks=scheme.activations == "group")
    return rows.dequantize(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """The second argument forward, the gradient of the first backward."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
