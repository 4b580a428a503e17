"""The backward pass of flash attention: dK and dV by tiles of keys, dQ by tiles of queries.

    P = exp(scores - lse)      dP = (dO V^T) * keep      dS = P * (dP - delta)      delta = rowsum(dO * O)
    dV = (P * keep)^T dO       dK = scale * dS^T Q       dQ = scale * dS K          dsink = -sum of P_sink * delta

Each gradient is summed by one program in a fixed order, at the price of computing the scores twice: nothing is added
atomically, so two runs give the same bits. The kernels are in `backward_keys.py`, `backward_queries.py` and
`backward_bias.py`; this file prepares, launches and allocates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.attention.backward_bias import bias_kernel
from trine.kernels.attention.backward_keys import keys_kernel
from trine.kernels.attention.backward_queries import queries_kernel
from trine.kernels.attention.configs import BIAS, KEYS, PREPARE, QUERIES
from trine.kernels.attention.options import Options, common_arguments, readable, row_stride, shape_of, strides
from trine.kernels.attention.tile import LOG2E, load_tile
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.target import target_of

# Rows of queries are padded to a multiple of the largest tile of queries.
_ROWS = 128


@triton.jit
def prepare_kernel(
    o_ptr, do_ptr, lse_ptr, delta_ptr, kept_lse_ptr,
    o_batch_stride, o_head_stride, o_row_stride, do_batch_stride, do_head_stride, do_row_stride,
    num_heads, num_queries, padded_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), and the log-sum-exp in log2 units, +inf for rows that see no key or lie past the end.

    Both are fp32 [B, H, padded_queries], so that tiles of queries need no mask.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    queries_M = first + tl.arange(0, BLOCK_M)
    o_base = o_ptr + batch * o_batch_stride + head * o_head_stride
    do_base = do_ptr + batch * do_batch_stride + head * do_head_stride
    o_MD = load_tile(o_base, first, o_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    do_MD = load_tile(do_base, first, do_row_stride, num_queries, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    delta_M = tl.sum(o_MD.to(tl.float32) * do_MD.to(tl.float32), axis=1)
    plane = batch * num_heads + head
    lse_M = tl.load(lse_ptr + plane * num_queries + queries_M, mask=queries_M < num_queries, other=float("-inf"))
    rows_M = plane * padded_queries + queries_M
    tl.store(delta_ptr + rows_M, delta_M)
    # exp2(score - inf) is 0, where score - -inf would not be a number.
    tl.store(kept_lse_ptr + rows_M, tl.where(lse_M == float("-inf"), float("inf"), lse_M * LOG2E))


def launch_backward(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, o_BHTD: Tensor, lse_BHT: Tensor, do_BHTD: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv (laid out as [B, T, H, D]), dbias_HR (empty without a table) and delta_BHT, both fp32."""
    q_BHTD, k_BKSD, v_BKSD, o_BHTD, do_BHTD = (readable(x) for x in (q_BHTD, k_BKSD, v_BKSD, o_BHTD, do_BHTD))
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    target, dtype = target_of(q_BHTD), q_BHTD.dtype
    dq_BHTD = q_BHTD.new_empty(B, T, H, D, dtype=result_dtype(dtype)).transpose(1, 2)
    dk_BKSD, dv_BKSD = (q_BHTD.new_empty(B, S, K, D, dtype=result_dtype(dtype)).transpose(1, 2) for _ in range(2))
    padded = ceil_div(T, _ROWS) * _ROWS
    delta_BHP, kept_BHP = (lse_BHT.new_empty(B, H, padded) for _ in range(2))
    entries = 0 if options.bias_HR is None else options.bias_HR.shape[1]
    dbias_HR = q_BHTD.new_zeros((H, entries) if options.bias_HR is not None else 0, dtype=torch.float32)
    if S == 0 or T == 0:
        dq, dk, dv = (rounded(x.zero_(), dtype) for x in (dq_BHTD, dk_BKSD, dv_BKSD))
        return dq, dk, dv, dbias_HR, torch.zeros_like(lse_BHT)
    common = common_arguments(q_BHTD, k_BKSD, v_BKSD, options)
    shape = shape_of(q_BHTD, k_BKSD, options)
    config = PREPARE.pick(dtype, target, **shape)
    prepare = {
        "o_ptr": o_BHTD,
        "do_ptr": do_BHTD,
        "lse_ptr": lse_BHT,
        "delta_ptr": delta_BHP,
        "kept_lse_ptr": kept_BHP,
        "padded_queries": padded,
        **strides("o", o_BHTD),
        **strides("do", do_BHTD),
        **{name: common[name] for name in ("num_heads", "num_queries", "HEAD_DIM", "BLOCK_D")},
    }
    launch(prepare_kernel, (padded // config.blocks["BLOCK_M"], H, B), config, prepare)
    common |= {name: prepare[name] for name in ("do_ptr", "delta_ptr", "padded_queries")} | strides("do", do_BHTD)
    common["lse_ptr"] = kept_BHP
    config = KEYS.pick(dtype, target, **shape)
    keys = {
        "dk_ptr": dk_BKSD,
        "dv_ptr": dv_BKSD,
        **strides("dk", dk_BKSD),
        "first_ptr": options.first_BS,
        "last_ptr": options.last_BS,
        "first_stride": row_stride(options.first_BS),
        "ORDERED": options.ordered,
    }
    launch(keys_kernel, (ceil_div(S, config.blocks["BLOCK_N"]), K, B), config, common | keys)
    config = QUERIES.pick(dtype, target, **shape)
    queries = {"dq_ptr": dq_BHTD, **strides("dq", dq_BHTD)}
    launch(queries_kernel, (ceil_div(T, config.blocks["BLOCK_M"]), H, B), config, common | queries)
    if entries:
        config = BIAS.pick(dtype, target, **shape)
        left_out = ("slopes_ptr", "position_ptr", "position_stride")
        wanted = {name: value for name, value in common.items() if name not in left_out}
        bias = {"dbias_ptr": dbias_HR, "num_batches": B}
        launch(bias_kernel, (ceil_div(entries, config.blocks["BLOCK_M"]), H), config, wanted | bias)
    dq, dk, dv = (rounded(x, dtype) for x in (dq_BHTD, dk_BKSD, dv_BKSD))
    return dq, dk, dv, dbias_HR, delta_BHP[:, :, :T].contiguous()
