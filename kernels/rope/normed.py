"""The backward of joined heads with norms of q and k: gradients of the joined product and of the norms' weights.

    g = the gradient turned back      u = g * weight      n = x / rms(x)
    dx = (u - n * mean(u * n)) / rms(x)      dweight = sum over tokens and heads of g * n

The root mean squares are computed again from the joined product. Programs for q and k stride over the heads, loads of
the next ones under way, and keep their own sums for the weight: no atomics, so the bits repeat. Bytes per number of b
bytes of q and k: 3 b, of v: 2 b; the sums are one row of D numbers per program, a few hundred rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2
from trine.kernels.rope.pairs import (
    head_places,
    load_angles,
    load_pair_scales,
    load_pairs,
    load_rest,
    load_rest_scales,
    store_pairs,
    store_rest,
)
from trine.kernels.rope.rotation import angle_arguments, blocks, copy_heads
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def _turn_back(
    dy_ptr, dy_stride, x_ptr, x_stride, dx_ptr, weight_ptr, sums_ptr, cos_ptr, sin_ptr, period, program, num_programs,
    num_tokens, num_heads, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Every `num_programs`-th block of heads; the program's sums for the weight."""
    scale1, scale2 = load_pair_scales(weight_ptr, R, INTERLEAVED, UNIT_OFFSET, BLOCK_R)
    sums1 = tl.zeros([ROWS, BLOCK_R], dtype=tl.float32)
    sums2 = tl.zeros([ROWS, BLOCK_R], dtype=tl.float32)
    if D > 2 * R:
        scale3 = load_rest_scales(weight_ptr, D, R, UNIT_OFFSET, BLOCK_P)
        sums3 = tl.zeros([ROWS, BLOCK_P], dtype=tl.float32)
    num_rows = num_tokens * num_heads
    for start in tl.range(program * ROWS, num_rows, num_programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        inside = rows < num_rows
        dy_places = head_places(rows, dy_stride, num_heads, D)
        x_places = head_places(rows, x_stride, num_heads, D)
        dy1, dy2 = load_pairs(dy_ptr, dy_places, inside, R, INTERLEAVED, BLOCK_R)
        x1, x2 = load_pairs(x_ptr, x_places, inside, R, INTERLEAVED, BLOCK_R)
        cos, sin = load_angles(cos_ptr, sin_ptr, rows, inside, num_heads, period, R, BLOCK_R)
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        if D > 2 * R:
            dy3 = load_rest(dy_ptr, dy_places, inside, D, R, BLOCK_P)
            x3 = load_rest(x_ptr, x_places, inside, D, R, BLOCK_P)
            squares += tl.sum(x3 * x3, axis=1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        x1 *= rstd
        x2 *= rstd
        g1 = dy1 * cos + dy2 * sin
        g2 = dy2 * cos - dy1 * sin
        sums1 += g1 * x1
        sums2 += g2 * x2
        g1 *= scale1[None, :]
        g2 *= scale2[None, :]
        products = tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)
        if D > 2 * R:
            x3 *= rstd
            sums3 += dy3 * x3
            dy3 *= scale3[None, :]
            products += tl.sum(dy3 * x3, axis=1)
        mean = (products / D)[:, None]
        g1 = (g1 - x1 * mean) * rstd
        g2 = (g2 - x2 * mean) * rstd
        store_pairs(dx_ptr, x_places, inside, g1, g2, R, INTERLEAVED, BLOCK_R)
        if D > 2 * R:
            store_rest(dx_ptr, x_places, inside, (dy3 - x3 * mean) * rstd, D, R, BLOCK_P)
    pairs = tl.arange(0, BLOCK_R)
    first = 2 * pairs if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else first + R
    tl.store(sums_ptr + program * D + first, tl.sum(sums1, axis=0), mask=pairs < R)
    tl.store(sums_ptr + program * D + second, tl.sum(sums2, axis=0), mask=pairs < R)
    if D > 2 * R:
        rest = 2 * R + tl.arange(0, BLOCK_P)
        tl.store(sums_ptr + program * D + rest, tl.sum(sums3, axis=0), mask=rest < D)


@triton.jit
def _normed_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, dq_out_ptr, dk_out_ptr, dv_out_ptr, q_weight_ptr, k_weight_ptr,
    q_sums_ptr, k_sums_ptr, cos_ptr, sin_ptr, stride, period, num_tokens, num_heads, num_kv_heads, q_programs,
    k_programs, eps,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first programs are for q, the next ones for k, the last ones copy v; `stride` is of joined rows."""
    program = tl.program_id(0)
    if program < q_programs:
        _turn_back(
            dq_ptr, num_heads * D, q_ptr, stride, dq_out_ptr, q_weight_ptr, q_sums_ptr, cos_ptr, sin_ptr, period,
            program, q_programs, num_tokens, num_heads, eps, D, R, INTERLEAVED, UNIT_OFFSET, ROWS, STAGES, BLOCK_R,
            BLOCK_P,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        _turn_back(
            dk_ptr, num_kv_heads * D, k_ptr, stride, dk_out_ptr, k_weight_ptr, k_sums_ptr, cos_ptr, sin_ptr, period,
            program - q_programs, k_programs, num_tokens, num_kv_heads, eps, D, R, INTERLEAVED, UNIT_OFFSET, ROWS,
            STAGES, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    else:
        copy_heads(
            dv_ptr, num_kv_heads * D, dv_out_ptr, stride, program - q_programs - k_programs, num_tokens, num_kv_heads,
            D, ROWS, BLOCK_D,
        )  # fmt: skip


# Numbers that a program holds of each tensor, and programs per multiprocessor: 16 warps are resident at a time.
_PROGRAM_NUMBERS = 2048
_PROGRAMS_PER_SM = 4


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"ROWS": 4, "STAGES": 1, **blocks(shape)})
    rows = max(1, min(64 // dtype.itemsize, _PROGRAM_NUMBERS // next_power_of_2(shape["exact_D"])))
    # One more than the tiles under way; AMD's would wait in registers.
    stages = 1 if target.is_amd else 3 if dtype.itemsize == 2 else 2
    return Config({"ROWS": rows, "STAGES": stages, **blocks(shape)}, num_warps=4, num_stages=stages)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    width = next_power_of_2(shape["exact_D"])
    return [
        Config({"ROWS": rows, "STAGES": stages, **blocks(shape)}, warps, stages)
        for rows in (4, 8, 16, 32)
        for warps in (2, 4, 8)
        for stages in (1, 2, 3)
        if 8 <= rows * width // (32 * warps) <= 32
    ]


BACKWARD = Tunable("rope_normed_backward", _rule, _candidates)


def launch_normed_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    parts: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Fill `results`, the gradients of `parts` (q, k, v as views of joined rows); the gradients of the weights.

    `grads`: contiguous [B, T, heads, D].
    """
    (dq, dk, _), (q, k, _) = grads, parts
    B, T, H, D = dq.shape
    K, target = dk.shape[2], target_of(dq)
    config = BACKWARD.pick(dq.dtype, target, N=B * T * (H + 2 * K), exact_D=D, exact_R=tables[0].shape[2])
    q_tiles, kv_tiles = (ceil_div(B * T * count, config.blocks["ROWS"]) for count in (H, K))
    # Programs for q and k in the proportion of their heads.
    q_programs = min(q_tiles, max(1, _PROGRAMS_PER_SM * target.num_sms * H // (H + K)))
    k_programs = min(kv_tiles, max(1, _PROGRAMS_PER_SM * target.num_sms - q_programs))
    q_sums, k_sums = (dq.new_empty(programs, D, dtype=torch.float32) for programs in (q_programs, k_programs))
    arguments = {
        **dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), grads, strict=True)),
        "q_ptr": q,
        "k_ptr": k,
        **dict(zip(("dq_out_ptr", "dk_out_ptr", "dv_out_ptr"), results, strict=True)),
        **dict(zip(("q_weight_ptr", "k_weight_ptr"), weights, strict=True)),
        "q_sums_ptr": q_sums,
        "k_sums_ptr": k_sums,
        **angle_arguments(*tables),
        "stride": (H + 2 * K) * D,
        "num_tokens": B * T,
        "num_heads": H,
        "num_kv_heads": K,
        "q_programs": q_programs,
        "k_programs": k_programs,
        "eps": eps,
        "D": D,
        "INTERLEAVED": interleaved,
        "UNIT_OFFSET": unit_offset,
        "BLOCK_D": next_power_of_2(D),
    }
    launch(_normed_backward_kernel, (q_programs + k_programs + kv_tiles if D else 0,), config, arguments)
    return q_sums.sum(dim=0).to(weights[0].dtype), k_sums.sum(dim=0).to(weights[1].dtype)
