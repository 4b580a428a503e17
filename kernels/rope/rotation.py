"""The rotary kernels but for the gradient of a norm: x to y, and a joined product to q, k, v or back.

Bytes per number of b bytes: 2 b. The angles of a token serve all its heads, which are neighbouring rows of one program;
they come from caches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.rope.pairs import (
    head_places,
    load_angles,
    load_pair_scales,
    load_pairs,
    load_rest,
    load_rest_scales,
    round_to,
    store_pairs,
    store_rest,
)
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable


@triton.jit
def turned(
    x_ptr, places, rows, inside, weight_ptr, cos_ptr, sin_ptr, period, num_heads, eps, sign,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Heads normalised where there is a weight, and turned: first channels, second channels, the rest (0 if none)."""
    x1, x2 = load_pairs(x_ptr, places, inside, R, INTERLEAVED, BLOCK_R)
    cos, sin = load_angles(cos_ptr, sin_ptr, rows, inside, num_heads, period, R, BLOCK_R)
    sin *= sign
    rest = tl.zeros([places.shape[0], BLOCK_P], dtype=tl.float32)
    if D > 2 * R:
        rest = load_rest(x_ptr, places, inside, D, R, BLOCK_P)
    if weight_ptr is not None:
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        if D > 2 * R:
            squares += tl.sum(rest * rest, axis=1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        scale1, scale2 = load_pair_scales(weight_ptr, R, INTERLEAVED, UNIT_OFFSET, BLOCK_R)
        x1 = round_to(x1 * rstd * scale1[None, :], x_ptr.dtype.element_ty)
        x2 = round_to(x2 * rstd * scale2[None, :], x_ptr.dtype.element_ty)
        if D > 2 * R:
            rest = rest * rstd * load_rest_scales(weight_ptr, D, R, UNIT_OFFSET, BLOCK_P)[None, :]
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest


@triton.jit
def turn_heads(
    x_ptr, x_stride, y_ptr, y_stride, weight_ptr, cos_ptr, sin_ptr, period, block, num_tokens, num_heads, eps, sign,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One block of heads from x to y."""
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < num_tokens * num_heads
    first, second, rest = turned(
        x_ptr, head_places(rows, x_stride, num_heads, D), rows, inside, weight_ptr, cos_ptr, sin_ptr, period, num_heads,
        eps, sign, D, R, INTERLEAVED, UNIT_OFFSET, BLOCK_R, BLOCK_P,
    )  # fmt: skip
    places = head_places(rows, y_stride, num_heads, D)
    store_pairs(y_ptr, places, inside, first, second, R, INTERLEAVED, BLOCK_R)
    if D > 2 * R:
        store_rest(y_ptr, places, inside, rest, D, R, BLOCK_P)


@triton.jit
def copy_heads(
    x_ptr, x_stride, y_ptr, y_stride, block, num_tokens, num_heads,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of heads, as they are."""
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < num_tokens * num_heads
    x = load_rest(x_ptr, head_places(rows, x_stride, num_heads, D), inside, D, 0, BLOCK_D)
    store_rest(y_ptr, head_places(rows, y_stride, num_heads, D), inside, x, D, 0, BLOCK_D)


@triton.jit
def _rotate_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, x_stride, y_stride, period, num_tokens, num_heads, sign,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    turn_heads(
        x_ptr, x_stride, y_ptr, y_stride, None, cos_ptr, sin_ptr, period, tl.program_id(0), num_tokens, num_heads, 0.0,
        sign, D, R, INTERLEAVED, False, ROWS, BLOCK_R, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _heads_kernel(
    q_in_ptr, k_in_ptr, v_in_ptr, q_out_ptr, k_out_ptr, v_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    q_in_stride, kv_in_stride, q_out_stride, kv_out_stride, period, num_tokens, num_heads, num_kv_heads,
    q_programs, k_programs, eps, sign,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first programs turn blocks of q, the next ones of k, the last ones copy v."""
    program = tl.program_id(0)
    if program < q_programs:
        turn_heads(
            q_in_ptr, q_in_stride, q_out_ptr, q_out_stride, q_weight_ptr, cos_ptr, sin_ptr, period, program,
            num_tokens, num_heads, eps, sign, D, R, INTERLEAVED, UNIT_OFFSET, ROWS, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        turn_heads(
            k_in_ptr, kv_in_stride, k_out_ptr, kv_out_stride, k_weight_ptr, cos_ptr, sin_ptr, period,
            program - q_programs, num_tokens, num_kv_heads, eps, sign, D, R, INTERLEAVED, UNIT_OFFSET, ROWS, BLOCK_R,
            BLOCK_P,
        )  # fmt: skip
    else:
        copy_heads(
            v_in_ptr, kv_in_stride, v_out_ptr, kv_out_stride, program - q_programs - k_programs, num_tokens,
            num_kv_heads, D, ROWS, BLOCK_D,
        )  # fmt: skip


def blocks(shape: Shape) -> dict[str, int]:
    """The blocks that a head's sizes decide."""
    D, R = shape["exact_D"], shape["exact_R"]
    return {"BLOCK_R": next_power_of_2(R), "BLOCK_P": next_power_of_2(D - 2 * R)}


# Numbers that a program holds: enough loads in flight to saturate memory, few enough for registers.
_PROGRAM_NUMBERS = 4096


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    width = next_power_of_2(shape["exact_D"])
    rows = 8 if target.interpreted else max(1, min(64, _PROGRAM_NUMBERS // width))
    return Config({"ROWS": rows, **blocks(shape)}, num_warps=4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    width = next_power_of_2(shape["exact_D"])
    return [
        Config({"ROWS": rows, **blocks(shape)}, warps, 1)
        for rows in (4, 8, 16, 32, 64)
        for warps in (2, 4, 8)
        if 8 <= rows * width // (32 * warps) <= 64
    ]


FORWARD = Tunable("rope", _rule, _candidates)


def angle_arguments(cos_BTR: Tensor, sin_BTR: Tensor) -> dict[str, Any]:
    """The tables, and after how many tokens they repeat."""
    return {
        "cos_ptr": cos_BTR.contiguous(),
        "sin_ptr": sin_BTR.contiguous(),
        "period": max(1, cos_BTR.shape[0] * cos_BTR.shape[1]),
        "R": cos_BTR.shape[2],
    }


def launch_rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x turned by the angles or the opposite ones: contiguous, in the dtype of x."""
    B, T, H, D = x_BTHD.shape
    stride = x_BTHD.stride(1)
    if x_BTHD.stride() != (T * stride, stride, D, 1):
        x_BTHD, stride = x_BTHD.contiguous(), H * D
    y_BTHD = x_BTHD.new_empty(x_BTHD.shape, dtype=result_dtype(x_BTHD.dtype))
    config = FORWARD.pick(x_BTHD.dtype, target_of(x_BTHD), N=B * T * H, exact_D=D, exact_R=cos_BTR.shape[2])
    arguments = {
        "x_ptr": x_BTHD,
        "y_ptr": y_BTHD,
        **angle_arguments(cos_BTR, sin_BTR),
        "x_stride": stride,
        "y_stride": H * D,
        "num_tokens": B * T,
        "num_heads": H,
        "sign": -1.0 if inverse else 1.0,
        "D": D,
        "INTERLEAVED": interleaved,
    }
    launch(_rotate_kernel, (ceil_div(B * T * H, config.blocks["ROWS"]) if D else 0,), config, arguments)
    return rounded(y_BTHD, x_BTHD.dtype)


def launch_heads(
    sources: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    interleaved: bool,
    eps: float,
    unit_offset: bool,
    *,
    inverse: bool,
) -> None:
    """q, k, v from `sources` to `results`, each [B, T, heads, D]: parts of joined rows to dense ones, or inverse."""
    q, k, _ = sources
    B, T, H, D = q.shape
    K = k.shape[2]
    joined = (H + 2 * K) * D  # a tensor's own stride means nothing where T is 1
    config = FORWARD.pick(q.dtype, target_of(q), N=B * T * (H + 2 * K), exact_D=D, exact_R=tables[0].shape[2])
    q_programs, kv_programs = (ceil_div(B * T * count, config.blocks["ROWS"]) for count in (H, K))
    arguments = {
        **dict(zip(("q_in_ptr", "k_in_ptr", "v_in_ptr"), sources, strict=True)),
        **dict(zip(("q_out_ptr", "k_out_ptr", "v_out_ptr"), results, strict=True)),
        **dict(zip(("q_weight_ptr", "k_weight_ptr"), weights, strict=True)),
        **angle_arguments(*tables),
        "q_in_stride": H * D if inverse else joined,
        "kv_in_stride": K * D if inverse else joined,
        "q_out_stride": joined if inverse else H * D,
        "kv_out_stride": joined if inverse else K * D,
        "num_tokens": B * T,
        "num_heads": H,
        "num_kv_heads": K,
        "q_programs": q_programs,
        "k_programs": kv_programs,
        "eps": eps,
        "sign": -1.0 if inverse else 1.0,
        "D": D,
        "INTERLEAVED": interleaved,
        "UNIT_OFFSET": unit_offset,
        "BLOCK_D": next_power_of_2(D),
    }
    launch(_heads_kernel, (q_programs + 2 * kv_programs if D else 0,), config, arguments)
