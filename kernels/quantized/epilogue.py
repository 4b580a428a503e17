"""The end of every quantized product: bias, activation or gate on fp32 sums, here or after a split over K.

    y = act(up + bu)      y = act(gate + bg) * (up + bu)      y = up + bu

A product of few rows is split over K, so that enough programs read the weight at once. Each part leaves its sums in
fp32 [P, S, M, N] (P products: 2 with a gate). The S parts of a number are added in their order, so that the bits
repeat, and finished: by the program that finishes its tile last (`last_program.py`), or by a second launch, with the
same bits. Bytes of that: M N (4 P S + itemsize).

Activations are those of `kernels/mlp`, `swiglu_clamped` among them; "none" is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.last_program import is_last
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
    num_rows,
    num_features,
    limit,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Finish sums [FEATURES, ROWS] and write them as a tile of y [M, N]."""
    features = tl.arange(0, FEATURES)
    rows = tl.arange(0, ROWS)
    within = features < num_features - feature
    inside = within[:, None] & (rows < num_rows - row)[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + feature + features, mask=within, other=0.0).to(tl.float32)[:, None]
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + feature + features, mask=within, other=0.0).to(tl.float32)[:, None]
    y = finish(gate, up, limit, GATED, ACTIVATION)
    y_ptr += tl.cast(row, tl.int64) * num_features + feature
    tl.store(y_ptr + rows[None, :] * num_features + features[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def end_tile(
    gate,
    up,
    y_ptr,
    parts_ptr,
    counter_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    row,
    feature,
    numbers,
    num_rows,
    num_features,
    limit,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Where K is not split `store_tile`; else leave one part in `parts` [P, S, numbers].

    Programs are numbered by tile and part. With counters, one a tile, the last program of a tile adds the parts up and
    finishes it.
    """
    if SPLITS == 1:
        store_tile(
            gate, up, y_ptr, gate_bias_ptr, up_bias_ptr, row, feature, num_rows, num_features, limit, GATED, ACTIVATION,
            FEATURES, ROWS,
        )  # fmt: skip
    else:
        features = tl.arange(0, FEATURES)
        rows = tl.arange(0, ROWS)
        inside = (features < num_features - feature)[:, None] & (rows < num_rows - row)[None, :]
        places = rows[None, :] * num_features + features[:, None]
        split = tl.program_id(1)
        parts_ptr += tl.cast(row, tl.int64) * num_features + feature
        tl.store(parts_ptr + split * numbers + places, up, mask=inside)
        if GATED:
            tl.store(parts_ptr + (SPLITS + split) * numbers + places, gate, mask=inside)
        last = False
        if counter_ptr is not None:
            last = is_last(counter_ptr + tl.program_id(0), SPLITS)
        if last:
            up_sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
            gate_sums = tl.zeros([FEATURES, ROWS], dtype=tl.float32)
            # All parts of a small tile are on their way at a time; one of a large tile takes registers enough.
            for part in tl.range(SPLITS, loop_unroll_factor=SPLITS if FEATURES * ROWS <= 4096 else 1):
                part_ptr = parts_ptr + part * numbers
                up_sums += tl.load(part_ptr + places, mask=inside, other=0.0, cache_modifier=".cg")
                if GATED:
                    part_ptr += SPLITS * numbers
                    gate_sums += tl.load(part_ptr + places, mask=inside, other=0.0, cache_modifier=".cg")
            store_tile(
                gate_sums, up_sums, y_ptr, gate_bias_ptr, up_bias_ptr, row, feature, num_rows, num_features, limit,
                GATED, ACTIVATION, FEATURES, ROWS,
            )  # fmt: skip


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
