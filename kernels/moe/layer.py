"""The launches of the mixture-of-experts layer and of its backward, in order; see `op.py` for the formulas.

`experts` are gate, up and down weights and then their biases, as the registered operation takes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trine.kernels.moe.combine import launch_combine
from trine.kernels.moe.groups import Groups
from trine.kernels.moe.matmul import cast
from trine.kernels.moe.pair_weights import launch_pair_weights
from trine.kernels.moe.product import by_expert, launch_product
from trine.kernels.moe.unit import Projections, launch_gated, launch_gated_backward
from trine.kernels.moe.weight_gradient import launch_bias_gradient, launch_weight_gradient


def _projections(experts: Sequence[Tensor | None], dtype: torch.dtype) -> Projections:
    gate_weight, up_weight, _, gate_bias, up_bias, _ = experts
    assert gate_weight is not None
    assert up_weight is not None
    gate_bias, up_bias = (None if bias is None else by_expert(cast(bias, dtype)) for bias in (gate_bias, up_bias))
    return Projections(by_expert(cast(gate_weight, dtype)), by_expert(cast(up_weight, dtype)), gate_bias, up_bias)


def launch_layer(
    x_NC: Tensor,
    weights_NK: Tensor,
    experts: Sequence[Tensor | None],
    groups: Groups,
    activation: str,
    limit: float | None,
) -> Tensor:
    """y_NC."""
    dtype = x_NC.dtype
    down_weight, down_bias = experts[2], experts[5]
    assert down_weight is not None
    h_PF = launch_gated(x_NC.contiguous(), _projections(experts, dtype), groups, activation, limit)
    down_bias = None if down_bias is None else cast(down_bias, dtype)
    rows_PC = launch_product(h_PF, cast(down_weight, dtype), groups, gather=False, bias_EF=down_bias)
    return launch_combine(rows_PC, weights_NK, groups)


def launch_layer_backward(
    dy_NC: Tensor,
    x_NC: Tensor,
    weights_NK: Tensor,
    experts: Sequence[Tensor | None],
    groups: Groups,
    activation: str,
    limit: float | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, weights, the three layers and the three biases; an empty tensor where none is needed."""
    dtype = x_NC.dtype
    x_NC, dy_NC, weights_NK = x_NC.contiguous(), dy_NC.contiguous(), weights_NK.contiguous()
    projections = _projections(experts, dtype)
    down_weight, down_bias = experts[2], experts[5]
    assert down_weight is not None
    dh_PF = launch_product(dy_NC, cast(down_weight, dtype), groups, gather=True, transposed=True)
    dgate_PF, dup_PF, scaled_PF, sums = launch_gated_backward(
        dh_PF, x_NC, weights_NK, projections, groups, activation, limit, sums=needed[1]
    )
    del dh_PF
    gradients = [x_NC.new_empty(0) for _ in needed]
    if sums is not None:
        gradients[1] = launch_pair_weights(sums, dy_NC, down_bias, groups, weights_NK.dtype)
    for place, dout_PF in ((2, dgate_PF), (3, dup_PF)):
        layer, bias = experts[place - 2], experts[place + 1]
        if layer is not None and needed[place]:
            gradients[place] = launch_weight_gradient(dout_PF, x_NC, groups, layer.dtype, gather_right=True)
        if bias is not None and needed[place + 3]:
            gradients[place + 3] = launch_bias_gradient(dout_PF, groups, bias.dtype)
    if needed[4]:
        gradients[4] = launch_weight_gradient(dy_NC, scaled_PF, groups, down_weight.dtype, gather_left=True)
    if down_bias is not None and needed[7]:
        gradients[7] = launch_bias_gradient(dy_NC, groups, down_bias.dtype, gather=True, scale_NK=weights_NK)
    if needed[0]:
        other = (dup_PF, projections.up_weight)
        dx_PC = launch_product(dgate_PF, projections.gate_weight, groups, gather=False, transposed=True, other=other)
        gradients[0] = launch_combine(dx_PC, None, groups)
    return gradients
