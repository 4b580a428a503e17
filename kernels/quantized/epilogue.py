"""The end of every quantized product: bias, activation or gate on fp32 sums, here or after a split over K.

    y = act(up + bu)      y = act(gate + bg) * (up + bu)      y = up + bu

A product of few rows is split over K, so that enough programs read the weight at once. Each part leaves its sums in
fp32 [P, S, M, N] (P products: 2 with a gate), and a second launch adds the S parts of a number in their order and
finishes it: no atomics, the bits repeat. Bytes of the second launch: M N (4 P S + itemsize).

Activations are those of `kernels/mlp`, `swiglu_clamped` among them; "none" is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch
from trine.kernels.mlp.projection import CLAMPED, activate_tile
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def finish(gate, up, limit, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """y in fp32 from the sums with their biases; `gate` counts only where GATED."""
    if ACTIVATION == CLAMPED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    if ACTIVATION == "none":
        y = up
    elif GATED:
        y, _ = activate_tile(gate, ACTIVATION)
        y *= up
    else:
        y, _ = activate_tile(up, ACTIVATION)
    return y


@triton.jit
def store_tile(
    gate,
    up,
    y_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    row,
    feature,
    split,
    num_rows,
    num_features,
    limit,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write sums [FEATURES, ROWS]: finished as y [M, N], or one part of them as they are."""
    features = tl.arange(0, FEATURES)
    rows = tl.arange(0, ROWS)
    inside = (features < num_features - feature)[:, None] & (rows < num_rows - row)[None, :]
    places = rows[None, :] * num_features + features[:, None]
    if SPLITS > 1:
        numbers = tl.cast(num_rows, tl.int64) * num_features
        y_ptr += split * numbers + tl.cast(row, tl.int64) * num_features + feature
        tl.store(y_ptr + places, up, mask=inside)
        if GATED:
            tl.store(y_ptr + SPLITS * numbers + places, gate, mask=inside)
    else:
        within = features < num_features - feature
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + feature + features, mask=within, other=0.0).to(tl.float32)[:, None]
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + feature + features, mask=within, other=0.0).to(tl.float32)[:, None]
        y = finish(gate, up, limit, GATED, ACTIVATION)
        y_ptr += tl.cast(row, tl.int64) * num_features + feature
        tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    parts_ptr,
    y_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    numbers,
    num_features,
    limit,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of y [M, N], counted through. EARLY: started while the parts are still made."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < numbers
    up = tl.zeros([BLOCK], dtype=tl.float32)
    gate = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part_ptr = parts_ptr + split * tl.cast(numbers, tl.int64)
        up += tl.load(part_ptr + places, mask=inside, other=0.0)
        if GATED:
            gate += tl.load(part_ptr + SPLITS * tl.cast(numbers, tl.int64) + places, mask=inside, other=0.0)
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + places % num_features, mask=inside, other=0.0).to(tl.float32)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + places % num_features, mask=inside, other=0.0).to(tl.float32)
    y = finish(gate, up, limit, GATED, ACTIVATION)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"BLOCK": 256})
    return Config({"BLOCK": 512}, num_warps=4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [Config({"BLOCK": block}, warps, 1) for block in (128, 256, 512, 1024, 2048) for warps in (2, 4, 8)]


COMBINE = Tunable("quantized_combine", _rule, _candidates)


def launch_combine(
    parts_PSMN: Tensor,
    y_MN: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
) -> None:
    """Fill y_MN."""
    products, splits, num_rows, num_features = parts_PSMN.shape
    target = target_of(y_MN)
    config = COMBINE.pick(y_MN.dtype, target, M=num_rows, N=num_features, S=splits)
    arguments = {
        "parts_ptr": parts_PSMN,
        "y_ptr": y_MN,
        "gate_bias_ptr": gate_bias,
        "up_bias_ptr": up_bias,
        "numbers": num_rows * num_features,
        "num_features": num_features,
        "limit": limit,
        "GATED": products == 2,
        "ACTIVATION": activation,
        "SPLITS": splits,
        "EARLY": target.starts_early,
    }
    grid = (ceil_div(num_rows * num_features, config.blocks["BLOCK"]),)
    launch(combine_kernel, grid, config, arguments, options={"launch_pdl": True} if target.starts_early else None)
