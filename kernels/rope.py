"""Rotary position embedding (RoPE): half-split or interleaved pairs, over all or the first 2R channels of a head.

Pairs of channels are turned by the angle position * inv_freq_i; i is paired with i + R (half-split, GPT-NeoX, Llama),
or 2i with 2i + 1 (interleaved, GPT-J). Channels from 2R on pass through.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

A rotation is undone by the opposite angle, so the backward is the same function with -sin and saves no activation.
`rope_heads` does it on the way from a joined q, k, v product to the layout of attention, in one pass, and can first
normalise every head of q and k (RMSNorm over D); its backward then starts from the joined product.
cos and sin are computed in fp32 and rounded to the dtype of x, as transformers does. The kernels compute in fp32 and
round once; a normalised value is rounded before it is turned, as the separate operations do.

Shapes: B batch, T tokens, H heads, K key-value heads, D head dimension, R pairs. Bytes per number of b bytes: 2 b forward
and backward, 3 b backward with the norms. Source: Su et al. 2021 (arXiv 2104.09864); Dehghani et al. 2023 (QK norm).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import INTERPRETED
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.rms_norm import rms_norm
from trine.kernels.samples import Sample, meta
from trine.kernels.target import Target, target_of, uses_triton
from trine.kernels.tuning import Config, Shape, Tunable


def rope_tables(positions_BT: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cos and sin of position * inv_freq, each [B, T, D/2] in `dtype` (the angles are fp32)."""
    angles = positions_BT[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_reference(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False) -> Tensor:
    """The formula; cos and sin of shape [B or 1, T, R] with 2R <= D."""
    x1, x2 = _pairs(x_BTHD, cos_BTR.shape[-1], interleaved)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    turned = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    return torch.cat((turned, x_BTHD[..., turned.shape[-1] :]), dim=-1)


def rope(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate every head of x by its token's angles; x, cos and sin share one dtype. Returns a new contiguous tensor.

    cos and sin: [B or 1, T, R], 2R <= D. Raises ValueError where dtypes or shapes do not fit.
    """
    if x_BTHD.dim() != 4:
        raise ValueError(f"x has shape {tuple(x_BTHD.shape)}; expected [B, T, H, D]")
    _check(x_BTHD, cos_BTR, sin_BTR, x_BTHD.shape[-1])
    if uses_triton(x_BTHD):
        return rope_rotate(x_BTHD, cos_BTR, sin_BTR, interleaved, False)
    result: Tensor = _Rope.apply(x_BTHD, cos_BTR, sin_BTR, interleaved)  # type: ignore[no-untyped-call]
    return result


def rope_heads(
    qkv_BTE: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    interleaved: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a joined product, E = (H + 2 K) D, into q_BHTD, k_BKTD, v_BKTD (contiguous), q and k rotated.

    With norm weights ([D], any float dtype, both or neither) every head of q and k is first normalised as `rms_norm`
    does. Raises ValueError where dtypes or shapes do not fit.
    """
    parts = num_heads + 2 * num_kv_heads
    if qkv_BTE.dim() != 3 or num_heads < 1 or num_kv_heads < 1 or qkv_BTE.shape[-1] % parts:
        raise ValueError(
            f"qkv has shape {tuple(qkv_BTE.shape)} for {num_heads} heads and {num_kv_heads} key-value heads; "
            "expected [B, T, (H + 2 K) D]"
        )
    D = qkv_BTE.shape[-1] // parts
    _check(qkv_BTE, cos_BTR, sin_BTR, D)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight go together; give both or neither")
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None and (weight.shape != (D,) or not weight.is_floating_point()):
            raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}; expected floating point ({D},)")
    if uses_triton(qkv_BTE):
        q_BHTD, k_BKTD, v_BKTD = rope_heads_forward(
            qkv_BTE,
            cos_BTR,
            sin_BTR,
            q_norm_weight,
            k_norm_weight,
            num_heads,
            num_kv_heads,
            interleaved,
            eps,
            unit_offset,
        )
        return q_BHTD, k_BKTD, v_BKTD
    if q_norm_weight is not None and k_norm_weight is not None:
        counts = [num_heads, num_kv_heads, num_kv_heads]
        q, k, v = qkv_BTE.unflatten(-1, (parts, D)).split(counts, dim=2)
        q = rope(rms_norm(q, q_norm_weight, eps, unit_offset=unit_offset), cos_BTR, sin_BTR, interleaved=interleaved)
        k = rope(rms_norm(k, k_norm_weight, eps, unit_offset=unit_offset), cos_BTR, sin_BTR, interleaved=interleaved)
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return q, k, v
    result: tuple[Tensor, Tensor, Tensor] = _RopeHeads.apply(  # type: ignore[no-untyped-call]
        qkv_BTE, cos_BTR, sin_BTR, num_heads, num_kv_heads, interleaved
    )
    return result


def _check(x: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, D: int) -> None:
    if x.dtype != cos_BTR.dtype or x.dtype != sin_BTR.dtype:
        raise ValueError(f"x is {x.dtype} but cos and sin are {cos_BTR.dtype}, {sin_BTR.dtype}; make them equal")
    B, T = x.shape[:2]
    if cos_BTR.shape != sin_BTR.shape or cos_BTR.dim() != 3 or cos_BTR.shape[:2] not in ((B, T), (1, T)):
        raise ValueError(
            f"cos and sin have shapes {tuple(cos_BTR.shape)}, {tuple(sin_BTR.shape)}; expected [{B} or 1, {T}, R]"
        )
    if 2 * cos_BTR.shape[-1] > D:
        raise ValueError(f"cos and sin turn {2 * cos_BTR.shape[-1]} channels but a head has {D}")
    if uses_triton(x) and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{x.dtype} is not supported by the kernel; use float32, bfloat16 or float16")


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def _round(x, LIKE: tl.constexpr):
    """fp32 `x` rounded to the dtype of a pointer; left alone for bf16 in the interpreter, which would truncate."""
    if INTERPRETED and LIKE == tl.bfloat16:
        return x
    return x.to(LIKE).to(tl.float32)


@triton.jit
def _square_sum(x):
    return tl.sum(x * x, axis=1)


@triton.jit
def _load(ptr, places, mask):
    return tl.load(ptr + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dx_ptr,
    dweight_ptr,
    num_tokens,
    T,
    num_heads,
    num_kv_heads,
    table_stride_b,
    eps,
    sign,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    JOINED: tl.constexpr,
    NORMED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program turns one head of blocks of tokens, from joined rows to q, k or v.

    BACKWARD goes from the gradients of q, k, v to that of the joined rows; each program strides over the tokens and
    keeps its own sum for the gradient of the norm's weight: no atomics, so the bits repeat. Not JOINED: from x to q,
    both [B, T, H, D].
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1)
    rotated = head < num_heads + num_kv_heads
    y_ptr = q_ptr
    part_head = head
    part_heads = num_heads
    if JOINED:
        if head >= num_heads:
            y_ptr = k_ptr
            part_head = head - num_heads
            part_heads = num_kv_heads
        if head >= num_heads + num_kv_heads:
            y_ptr = v_ptr
            part_head = head - num_heads - num_kv_heads
    row_heads = num_heads + 2 * num_kv_heads
    pairs = tl.arange(0, BLOCK_R)
    in_pairs = pairs < R
    if INTERLEAVED:
        first = 2 * pairs
        second = 2 * pairs + 1
    else:
        first = pairs
        second = pairs + R
    rest = 2 * R + tl.arange(0, BLOCK_P)
    in_rest = rest < D
    if NORMED:
        weight_ptr = q_weight_ptr
        if head >= num_heads:
            weight_ptr = k_weight_ptr
        w1 = tl.load(weight_ptr + first, mask=in_pairs, other=0.0).to(tl.float32) + UNIT_OFFSET
        w2 = tl.load(weight_ptr + second, mask=in_pairs, other=0.0).to(tl.float32) + UNIT_OFFSET
        wp = tl.load(weight_ptr + rest, mask=in_rest, other=0.0).to(tl.float32) + UNIT_OFFSET
        if BACKWARD:
            dw1 = tl.zeros([TOKENS, BLOCK_R], dtype=tl.float32)
            dw2 = tl.zeros([TOKENS, BLOCK_R], dtype=tl.float32)
            dwp = tl.zeros([TOKENS, BLOCK_P], dtype=tl.float32)
    for start in range(program * TOKENS, num_tokens, num_programs * TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        batch = (tokens // T).to(tl.int64)
        position = tokens % T
        inside = tokens[:, None] < num_tokens
        mask_r = inside & in_pairs[None, :]
        mask_p = inside & in_rest[None, :]
        x_rows = ((tokens.to(tl.int64) * row_heads + head) * D)[:, None]
        if JOINED:
            y_rows = (((batch * part_heads + part_head) * T + position) * D)[:, None]
        else:
            y_rows = x_rows
        tables = (batch * table_stride_b + position.to(tl.int64) * R)[:, None] + pairs[None, :]
        cos = _load(cos_ptr, tables, mask_r)
        sin = _load(sin_ptr, tables, mask_r) * sign
        if NORMED or not BACKWARD:
            x1 = _load(x_ptr, x_rows + first[None, :], mask_r)
            x2 = _load(x_ptr, x_rows + second[None, :], mask_r)
            xp = _load(x_ptr, x_rows + rest[None, :], mask_p)
        if NORMED:
            rstd = tl.rsqrt((_square_sum(x1) + _square_sum(x2) + _square_sum(xp)) / D + eps)[:, None]
        if BACKWARD:
            d1 = _load(y_ptr, y_rows + first[None, :], mask_r)
            d2 = _load(y_ptr, y_rows + second[None, :], mask_r)
            dp = _load(y_ptr, y_rows + rest[None, :], mask_p)
            g1 = tl.where(rotated, d1 * cos + d2 * sin, d1)
            g2 = tl.where(rotated, d2 * cos - d1 * sin, d2)
            if NORMED:
                n1 = x1 * rstd
                n2 = x2 * rstd
                np = xp * rstd
                dw1 += g1 * n1
                dw2 += g2 * n2
                dwp += dp * np
                u1 = g1 * w1[None, :]
                u2 = g2 * w2[None, :]
                up = dp * wp[None, :]
                mean = ((tl.sum(u1 * n1, axis=1) + tl.sum(u2 * n2, axis=1) + tl.sum(up * np, axis=1)) / D)[:, None]
                g1 = tl.where(rotated, (u1 - n1 * mean) * rstd, g1)
                g2 = tl.where(rotated, (u2 - n2 * mean) * rstd, g2)
                dp = tl.where(rotated, (up - np * mean) * rstd, dp)
            tl.store(dx_ptr + x_rows + first[None, :], g1.to(dx_ptr.dtype.element_ty), mask=mask_r)
            tl.store(dx_ptr + x_rows + second[None, :], g2.to(dx_ptr.dtype.element_ty), mask=mask_r)
            tl.store(dx_ptr + x_rows + rest[None, :], dp.to(dx_ptr.dtype.element_ty), mask=mask_p)
        else:
            if NORMED:
                x1 = tl.where(rotated, _round(x1 * rstd * w1[None, :], x_ptr.dtype.element_ty), x1)
                x2 = tl.where(rotated, _round(x2 * rstd * w2[None, :], x_ptr.dtype.element_ty), x2)
                xp = tl.where(rotated, _round(xp * rstd * wp[None, :], x_ptr.dtype.element_ty), xp)
            y1 = tl.where(rotated, x1 * cos - x2 * sin, x1)
            y2 = tl.where(rotated, x2 * cos + x1 * sin, x2)
            tl.store(y_ptr + y_rows + first[None, :], y1.to(y_ptr.dtype.element_ty), mask=mask_r)
            tl.store(y_ptr + y_rows + second[None, :], y2.to(y_ptr.dtype.element_ty), mask=mask_r)
            tl.store(y_ptr + y_rows + rest[None, :], xp.to(y_ptr.dtype.element_ty), mask=mask_p)
    if NORMED and BACKWARD:
        sums = dweight_ptr + (program * row_heads + head).to(tl.int64) * D
        tl.store(sums + first, tl.sum(dw1, axis=0), mask=in_pairs)
        tl.store(sums + second, tl.sum(dw2, axis=0), mask=in_pairs)
        tl.store(sums + rest, tl.sum(dwp, axis=0), mask=in_rest)


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    blocks = _blocks(shape["exact_D"], shape["exact_R"])
    width = 2 * blocks["BLOCK_R"] + blocks["BLOCK_P"]
    if target.interpreted:
        return Config({"TOKENS": 4, **blocks})
    return Config({"TOKENS": max(1, min(32, 2048 // width)), **blocks}, num_warps=4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    blocks = _blocks(shape["exact_D"], shape["exact_R"])
    return [Config({"TOKENS": tokens, **blocks}, warps, 1) for tokens in (4, 8, 16, 32) for warps in (2, 4, 8)]


def _blocks(D: int, R: int) -> dict[str, int]:
    return {"BLOCK_R": next_power_of_2(R), "BLOCK_P": next_power_of_2(D - 2 * R)}


FORWARD = Tunable("rope_forward", _rule, _candidates)
BACKWARD = Tunable("rope_backward", _rule, _candidates)


def _tables(cos_BTR: Tensor, sin_BTR: Tensor) -> dict[str, Any]:
    cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
    stride = 0 if cos_BTR.shape[0] == 1 else cos_BTR.shape[1] * cos_BTR.shape[2]
    return {"cos_ptr": cos_BTR, "sin_ptr": sin_BTR, "table_stride_b": stride, "R": cos_BTR.shape[2]}


def _launch_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    x = x.contiguous()
    B, T, H, D = x.shape
    y = torch.empty_like(x, dtype=result_dtype(x.dtype))
    config = FORWARD.pick(x.dtype, target_of(x), N=B * T, exact_D=D, exact_R=cos.shape[2])
    arguments = {
        "x_ptr": x,
        **_tables(cos, sin),
        "q_ptr": y,
        **dict.fromkeys(("k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "dx_ptr", "dweight_ptr")),
        "num_tokens": B * T,
        "T": T,
        "num_heads": H,
        "num_kv_heads": 0,
        "eps": 0.0,
        "sign": -1.0 if inverse else 1.0,
        "D": D,
        "INTERLEAVED": interleaved,
        "JOINED": False,
        "NORMED": False,
        "UNIT_OFFSET": False,
        "BACKWARD": False,
    }
    launch(_kernel, (ceil_div(B * T, config.blocks["TOKENS"]) if D else 0, H), config, arguments)
    return rounded(y, x.dtype)


def _launch_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    H: int,
    K: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """q, k, v; with `grads` the gradients of qkv and of the two weights (empty without)."""
    qkv = qkv.contiguous()
    B, T, E = qkv.shape
    D, target, normed = E // (H + 2 * K), target_of(qkv), q_weight is not None
    tunable = FORWARD if grads is None else BACKWARD
    config = tunable.pick(qkv.dtype, target, N=B * T, exact_D=D, exact_R=cos.shape[2])
    num_programs = ceil_div(B * T, config.blocks["TOKENS"]) if D else 0
    dqkv: Tensor | None = None
    sums: Tensor | None = None
    if grads is None:
        outputs = tuple(qkv.new_empty(B, n, T, D, dtype=result_dtype(qkv.dtype)) for n in (H, K, K))
    else:
        outputs = tuple(grad.contiguous() for grad in grads)
        dqkv = torch.empty_like(qkv, dtype=result_dtype(qkv.dtype))
        if normed:
            num_programs = min(num_programs, ceil_div(8 * target.num_sms, H + 2 * K))
            sums = qkv.new_empty(num_programs, H + 2 * K, D, dtype=torch.float32)
    arguments = {
        "x_ptr": qkv,
        **_tables(cos, sin),
        **dict(zip(("q_ptr", "k_ptr", "v_ptr"), outputs, strict=True)),
        "q_weight_ptr": None if q_weight is None else q_weight.contiguous(),
        "k_weight_ptr": None if k_weight is None else k_weight.contiguous(),
        "dx_ptr": dqkv,
        "dweight_ptr": sums,
        "num_tokens": B * T,
        "T": T,
        "num_heads": H,
        "num_kv_heads": K,
        "eps": eps,
        "sign": 1.0,
        "D": D,
        "INTERLEAVED": interleaved,
        "JOINED": True,
        "NORMED": normed,
        "UNIT_OFFSET": unit_offset,
        "BACKWARD": grads is not None,
    }
    launch(_kernel, (num_programs, H + 2 * K), config, arguments)
    if dqkv is None:
        return tuple(rounded(y, qkv.dtype) for y in outputs)
    dweights = [qkv.new_empty(0), qkv.new_empty(0)]
    if sums is not None and q_weight is not None and k_weight is not None:
        dweights = [
            sums[:, :H].sum(dim=(0, 1)).to(q_weight.dtype),
            sums[:, H : H + K].sum(dim=(0, 1)).to(k_weight.dtype),
        ]
    return rounded(dqkv, qkv.dtype), *dweights


@torch.library.custom_op("trine::rope_rotate", mutates_args=())
def rope_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """The registered operation: x turned by the angles, or by the opposite ones."""
    return _launch_rotate(x, cos, sin, interleaved, inverse)


@rope_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    return rope_rotate(dy, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


rope_rotate.register_autograd(_rotate_backward, setup_context=_rotate_context)


@torch.library.custom_op("trine::rope_heads_forward", mutates_args=())
def rope_heads_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: q, k, v."""
    q, k, v = _launch_heads(qkv, cos, sin, q_weight, k_weight, num_heads, num_kv_heads, interleaved, eps, unit_offset)
    return q, k, v


@rope_heads_forward.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, E = qkv.shape
    D = E // (num_heads + 2 * num_kv_heads)
    k = qkv.new_empty(B, num_kv_heads, T, D)
    return qkv.new_empty(B, num_heads, T, D), k, torch.empty_like(k)


@torch.library.custom_op("trine::rope_heads_backward", mutates_args=())
def rope_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: dqkv and the gradients of the two weights (empty without weights).

    Without weights only the shape of qkv is used.
    """
    counts = dq.shape[1], dk.shape[1]
    dqkv, dq_weight, dk_weight = _launch_heads(
        qkv, cos, sin, q_weight, k_weight, *counts, interleaved, eps, unit_offset, (dq, dk, dv)
    )
    return dqkv, dq_weight, dk_weight


@rope_heads_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if q_weight is None or k_weight is None:
        return dqkv, qkv.new_empty(0), qkv.new_empty(0)
    return dqkv, torch.empty_like(q_weight), torch.empty_like(k_weight)


def _heads_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, q_weight, k_weight, _, _, ctx.interleaved, ctx.eps, ctx.unit_offset = inputs
    ctx.save_for_backward(qkv, cos, sin, q_weight, k_weight)


def _heads_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor only once
    dqkv, dq_weight, dk_weight = rope_heads_backward(dq, dk, dv, *saved, ctx.interleaved, ctx.eps, ctx.unit_offset)
    normed = saved[3] is not None
    return dqkv, None, None, dq_weight if normed else None, dk_weight if normed else None, *[None] * 5


rope_heads_forward.register_autograd(_heads_backward, setup_context=_heads_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    B, T, H, K, D = 2, 4096, 32, 8, 128
    dtype = torch.bfloat16
    for R, interleaved, normed in ((64, False, False), (64, False, True), (16, True, False), (16, True, True)):
        qkv, table = meta(B, T, (H + 2 * K) * D, dtype=dtype), meta(1, T, R, dtype=dtype)
        weight = meta(D, dtype=dtype) if normed else None
        grads = meta(B, H, T, D, dtype=dtype), meta(B, K, T, D, dtype=dtype), meta(B, K, T, D, dtype=dtype)
        call = partial(_launch_heads, qkv, table, table, weight, weight, H, K, interleaved, 1e-6, False)
        name = f"R{R}{' interleaved' * interleaved}{' normed' * normed}"
        yield Sample(f"rope_heads {name}", dtype, call)
        yield Sample(f"rope_heads backward {name}", dtype, partial(call, grads))
    x, table = meta(B, T, H, D), meta(1, T, D // 2)
    yield Sample("rope", torch.float32, partial(_launch_rotate, x, table, table, False, False))


# --- CPU --------------------------------------------------------------------------------------------------------------


def _pairs(x: Tensor, R: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channels of the pairs, as views."""
    if interleaved:
        return x[..., 0 : 2 * R : 2], x[..., 1 : 2 * R : 2]
    return x[..., :R], x[..., R : 2 * R]


def _rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float, interleaved: bool = False) -> Tensor:
    y_BTHD = torch.empty(x_BTHD.shape, dtype=x_BTHD.dtype, device=x_BTHD.device)
    _rotate_into(y_BTHD, x_BTHD, cos_BTR, sin_BTR, sign=sign, interleaved=interleaved)
    return y_BTHD


def _rotate_into(
    y_BTHD: Tensor, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, sign: float, interleaved: bool = False
) -> None:
    R = cos_BTR.shape[-1]
    x1, x2 = _pairs(x_BTHD, R, interleaved)
    y1, y2 = _pairs(y_BTHD, R, interleaved)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    y_BTHD[..., 2 * R :].copy_(x_BTHD[..., 2 * R :])


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos_BTR, sin_BTR)
        return _rotate(x_BTHD, cos_BTR, sin_BTR, sign=1.0, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (dy_BTHD,) = grads
        cos_BTR, sin_BTR = ctx.saved_tensors
        return _rotate(dy_BTHD, cos_BTR, sin_BTR, sign=-1.0, interleaved=ctx.interleaved), None, None, None


class _RopeHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTE: Tensor,
        cos_BTR: Tensor,
        sin_BTR: Tensor,
        num_heads: int,
        num_kv_heads: int,
        interleaved: bool,
    ) -> tuple[Tensor, ...]:
        B, T, E = qkv_BTE.shape
        counts = [num_heads, num_kv_heads, num_kv_heads]
        D = E // sum(counts)
        parts_BTHD = torch.split(qkv_BTE.view(B, T, -1, D), counts, dim=2)
        q_BHTD, k_BKTD, v_BKTD = (qkv_BTE.new_empty(B, count, T, D) for count in counts)
        for y_BHTD, x_BTHD in zip((q_BHTD, k_BKTD), parts_BTHD[:2], strict=True):
            _rotate_into(y_BHTD.transpose(1, 2), x_BTHD, cos_BTR, sin_BTR, sign=1.0, interleaved=interleaved)
        v_BKTD.transpose(1, 2).copy_(parts_BTHD[2])
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.counts = counts
        ctx.interleaved = interleaved
        return q_BHTD, k_BKTD, v_BKTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        cos_BTR, sin_BTR = ctx.saved_tensors
        B, _, T, D = grads[0].shape
        dqkv_BTHD = grads[0].new_empty(B, T, sum(ctx.counts), D)
        parts_BTHD = torch.split(dqkv_BTHD, ctx.counts, dim=2)
        for dx_BTHD, dy_BHTD in zip(parts_BTHD[:2], grads[:2], strict=True):
            _rotate_into(dx_BTHD, dy_BHTD.transpose(1, 2), cos_BTR, sin_BTR, sign=-1.0, interleaved=ctx.interleaved)
        parts_BTHD[2].copy_(grads[2].transpose(1, 2))
        return dqkv_BTHD.view(B, T, -1), None, None, None, None, None
