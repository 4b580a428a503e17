"""The gradient of the weights of pairs: dweight[n, k] = dy[n] . (h[r] Wd[e]^T + bd[e]) for the row r of (n, k).

The result of the down projection is not computed again for it: with dh[r] = dy[n] Wd[e], which the backward needs
anyway, the first term is dh[r] . h[r]. `unit.py` sums that for each tile of columns; here the sums are added in order,
and dy[n] . bd[e] where there is a bias.

Shapes: N tokens, K slots, P = N K pairs, T tiles of columns, C width. Bytes: 4 T P, and with a bias b C P.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import launch
from trine.kernels.moe.groups import Groups, tile_list
from trine.kernels.moe.product import by_expert, product_arguments
from trine.kernels.target import target_of
from trine.kernels.tuning import Config


@triton.jit
def _pair_weights_kernel(
    sum_ptr,
    dy_ptr,
    bias_ptr,
    dweight_ptr,
    pair_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles,
    num_pairs,
    num_experts,
    num_sums,
    width,
    bias_stride,
    NUM_SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of the weights of a tile's pairs: their sums in order, and dy . bias of the down projection."""
    tile = tl.program_id(0)
    expert = tl.load(tile_ptr + tile)
    if expert >= num_experts:
        return
    row = tl.load(tile_ptr + num_tiles + tile)
    rows = row + tl.arange(0, ROWS)
    inside = rows < tl.load(offset_ptr + expert + 1)
    pairs = tl.load(pair_ptr + rows, mask=inside, other=0)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for _ in range(num_sums):
        total += tl.load(sum_ptr + rows, mask=inside, other=0.0)
        sum_ptr += num_pairs
    if bias_ptr is not None:
        bias_ptr += expert.to(tl.int64) * bias_stride
        columns = tl.arange(0, COLUMNS)
        places = (pairs // NUM_SLOTS)[:, None].to(tl.int64) * width + columns[None, :]
        products = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, width, COLUMNS):
            wanted = columns < width - start
            bias = tl.load(bias_ptr + start + columns, mask=wanted, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + start + places, mask=inside[:, None] & wanted[None, :], other=0.0)
            products += dy.to(tl.float32) * bias[None, :]
        total += tl.sum(products, axis=1)
    tl.store(dweight_ptr + pairs, total, mask=inside)


def launch_pair_weights(
    sums_TP: Tensor, dy_NC: Tensor, down_bias: Tensor | None, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """dweights_NK in `dtype`; zero for slots of no expert."""
    num_sums, num_pairs = sums_TP.shape
    dweights_NK = dy_NC.new_zeros(num_pairs // groups.num_slots, groups.num_slots, dtype=torch.float32)
    config = _pair_config(target_of(dy_NC).interpreted)
    tiles_2M = tile_list(groups, config.blocks["ROWS"])
    down_bias = None if down_bias is None else by_expert(down_bias)
    arguments = {
        "sum_ptr": sums_TP,
        "dy_ptr": dy_NC,
        "bias_ptr": down_bias,
        "dweight_ptr": dweights_NK,
        **product_arguments(groups, tiles_2M, gather=True),
        "num_pairs": num_pairs,
        "num_sums": num_sums,
        "width": dy_NC.shape[1],
        "bias_stride": 0 if down_bias is None else down_bias.stride(0),
    }
    launch(_pair_weights_kernel, (tiles_2M.shape[1],), config, arguments)
    return dweights_NK.to(dtype)


def _pair_config(interpreted: bool) -> Config:
    return Config({"ROWS": 16, "COLUMNS": 16 if interpreted else 128}, num_warps=4, num_stages=2)
