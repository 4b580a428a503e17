"""The parts of grouped products that were split over K, added up in their order, with bias and activation or gate.

A launch of its own, where not the last program of a tile does it (`last_program.py`).

Each part leaves fp32 sums [P, N]; the parts of both projections are [products, splits, P, N]. No atomics: the bits
repeat. Bytes: P N (4 products splits + itemsize).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2
from trine.kernels.moe.groups import Groups
from trine.kernels.quantized.epilogue import finish
from trine.kernels.target import target_of
from trine.kernels.tuning import Config


@triton.jit
def grouped_parts_kernel(
    parts_ptr,
    y_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    offset_ptr,
    num_pairs,
    num_features,
    num_experts,
    limit,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK features of one row; nothing for a row of no expert."""
    row = tl.program_id(0)
    if row >= tl.load(offset_ptr + num_experts):
        return
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = features < num_features
    numbers = tl.cast(num_pairs, tl.int64) * num_features
    first = row.to(tl.int64) * num_features
    up = tl.zeros([BLOCK], dtype=tl.float32)
    gate = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part_ptr = parts_ptr + split * numbers + first
        up += tl.load(part_ptr + features, mask=inside, other=0.0)
        if GATED:
            gate += tl.load(part_ptr + SPLITS * numbers + features, mask=inside, other=0.0)
    if up_bias_ptr is not None:
        experts = tl.arange(0, BINS)
        ends = tl.load(offset_ptr + 1 + experts, mask=experts < num_experts, other=num_pairs)
        places = tl.sum((ends <= row).to(tl.int32), axis=0) * num_features + features
        up += tl.load(up_bias_ptr + places, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate += tl.load(gate_bias_ptr + places, mask=inside, other=0.0).to(tl.float32)
    y = finish(gate, up, limit, GATED, ACTIVATION)
    tl.store(y_ptr + first + features, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch_parts(
    parts: Tensor,
    y_PN: Tensor,
    groups: Groups,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    limit: float | None,
) -> None:
    """Fill y_PN. Biases [E, N] come both or not at all where there are two products."""
    products, splits, num_pairs, num_features = parts.shape
    small = target_of(y_PN).interpreted
    config = Config({"BLOCK": 64 if small else 512}, num_warps=4, num_stages=1)
    arguments = {
        "parts_ptr": parts,
        "y_ptr": y_PN,
        "gate_bias_ptr": gate_bias,
        "up_bias_ptr": up_bias,
        "offset_ptr": groups.offset,
        "num_pairs": num_pairs,
        "num_features": num_features,
        "num_experts": groups.num_experts,
        "limit": limit,
        "GATED": products == 2,
        "ACTIVATION": activation,
        "SPLITS": splits,
        "BINS": next_power_of_2(groups.num_experts),
    }
    launch(grouped_parts_kernel, (num_pairs, ceil_div(num_features, config.blocks["BLOCK"])), config, arguments)
