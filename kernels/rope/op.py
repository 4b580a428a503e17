"""Rotary position embedding (RoPE): half-split or interleaved pairs, over all or the first 2R channels of a head.

Pairs of channels are turned by the angle position * inv_freq_i; i is paired with i + R (half-split, GPT-NeoX, Llama),
or 2i with 2i + 1 (interleaved, GPT-J). Channels from 2R on pass through.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

A rotation is undone by the opposite angle, so the backward is the same function with -sin and saves no activation.
`rope_heads` cuts a joined q, k, v product on the way, in one pass, and can first normalise every head of q and k
(RMSNorm over D); its backward then starts from the joined product (`normed.py`).
cos and sin are computed in fp32 and rounded to the dtype of x, as transformers does. The kernels compute in fp32 and
round once; a normalised value is rounded before it is turned, as the separate operations do.

Shapes: B batch, T tokens, H heads, K key-value heads, D head dimension, R pairs. Bytes per number of b bytes: 2 b
forward and backward, 3 b for q and k backward with norms; the tables are read from caches. 6 operations a pair.
Source: Su et al. 2021 (arXiv 2104.09864); Dehghani et al. 2023 (arXiv 2302.05442) for norms of q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.launch import result_dtype, rounded
from trine.kernels.operation import run
from trine.kernels.rms_norm import rms_norm
from trine.kernels.rope.cpu import Rope, RopeHeads, pairs
from trine.kernels.rope.normed import launch_normed_backward
from trine.kernels.rope.rotation import launch_heads, launch_rotate
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton


def rope_tables(positions_BT: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cos and sin of position * inv_freq, each [B, T, D/2] in `dtype` (the angles are fp32)."""
    angles = positions_BT[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_reference(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, *, interleaved: bool = False) -> Tensor:
    """The formula; cos and sin of shape [B or 1, T, R] with 2R <= D."""
    x1, x2 = pairs(x_BTHD, cos_BTR.shape[-1], interleaved)
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
        turned: Tensor = run(rope_rotate, x_BTHD, cos_BTR, sin_BTR, interleaved, False)
        return turned
    result: Tensor = Rope.apply(x_BTHD, cos_BTR, sin_BTR, interleaved)  # type: ignore[no-untyped-call]
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
    """Cut a joined product, E = (H + 2 K) D, into q_BHTD, k_BKTD, v_BKTD, q and k rotated.

    None is a view of the product, but for v on a CPU with norms. From kernels they lie in memory as [B, T, heads, D],
    which attention reads as well and which is how it returns its gradients: nothing is transposed. With norm weights
    ([D], any float dtype, both or neither) every head of q and k is first normalised as `rms_norm` does. Raises
    ValueError where dtypes or shapes do not fit.
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
        parts = run(
            rope_heads_forward,
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
        q, k, v = (part.transpose(1, 2) for part in parts)
        return q, k, v
    if q_norm_weight is not None and k_norm_weight is not None:
        counts = [num_heads, num_kv_heads, num_kv_heads]
        q, k, v = qkv_BTE.unflatten(-1, (parts, D)).split(counts, dim=2)
        q = rope(rms_norm(q, q_norm_weight, eps, unit_offset=unit_offset), cos_BTR, sin_BTR, interleaved=interleaved)
        k = rope(rms_norm(k, k_norm_weight, eps, unit_offset=unit_offset), cos_BTR, sin_BTR, interleaved=interleaved)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return q, k, v
    result: tuple[Tensor, Tensor, Tensor] = RopeHeads.apply(  # type: ignore[no-untyped-call]
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


def _cut(qkv_BTE: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Joined rows as views of q, k and v, each [B, T, heads, D]."""
    counts = [num_heads, num_kv_heads, num_kv_heads]
    q, k, v = qkv_BTE.unflatten(-1, (sum(counts), qkv_BTE.shape[-1] // sum(counts))).split(counts, dim=2)
    return q, k, v


def _launch_forward(
    qkv_BTE: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each contiguous [B, T, heads, D]."""
    parts = _cut(qkv_BTE.contiguous(), num_heads, num_kv_heads)
    q, k, v = (part.new_empty(part.shape, dtype=result_dtype(part.dtype)) for part in parts)
    q_weight, k_weight = (None if weight is None else weight.contiguous() for weight in (q_weight, k_weight))
    tables, weights = (cos_BTR, sin_BTR), (q_weight, k_weight)
    launch_heads(parts, (q, k, v), tables, weights, interleaved, eps, unit_offset, inverse=False)
    return rounded(q, qkv_BTE.dtype), rounded(k, qkv_BTE.dtype), rounded(v, qkv_BTE.dtype)


def _launch_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv_BTE: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv and the gradients of the two weights (empty without weights)."""
    grads = dq.contiguous(), dk.contiguous(), dv.contiguous()
    B, T, H, D = dq.shape
    K = dk.shape[2]
    dqkv = dq.new_empty(B, T, (H + 2 * K) * D, dtype=result_dtype(dq.dtype))
    results, tables = _cut(dqkv, H, K), (cos_BTR, sin_BTR)
    if qkv_BTE is None or q_weight is None or k_weight is None:
        launch_heads(grads, results, tables, (None, None), interleaved, eps, unit_offset, inverse=True)
        return rounded(dqkv, dq.dtype), dq.new_empty(0), dq.new_empty(0)
    weights = q_weight.contiguous(), k_weight.contiguous()
    parts = _cut(qkv_BTE.contiguous(), H, K)
    dq_weight, dk_weight = launch_normed_backward(grads, parts, results, tables, weights, interleaved, eps, unit_offset)
    return rounded(dqkv, dq.dtype), dq_weight, dk_weight


@torch.library.custom_op("trine::rope_rotate", mutates_args=())
def rope_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """The registered operation: x turned by the angles, or by the opposite ones."""
    return launch_rotate(x, cos, sin, interleaved, inverse)


@rope_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    return run(rope_rotate, dy, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


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
    """The registered operation: q, k, v, each contiguous [B, T, heads, D]."""
    options = (interleaved, eps, unit_offset)
    return _launch_forward(qkv, cos, sin, q_weight, k_weight, num_heads, num_kv_heads, *options)


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
    k = qkv.new_empty(B, T, num_kv_heads, D)
    return qkv.new_empty(B, T, num_heads, D), k, torch.empty_like(k)


@torch.library.custom_op("trine::rope_heads_backward", mutates_args=())
def rope_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation: dqkv and the gradients of the two weights; without weights qkv is not needed."""
    return _launch_backward(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, interleaved, eps, unit_offset)


@rope_heads_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dqkv = dq.new_empty(*dq.shape[:2], (dq.shape[2] + 2 * dk.shape[2]) * dq.shape[3])
    if q_weight is None or k_weight is None:
        return dqkv, dq.new_empty(0), dq.new_empty(0)
    return dqkv, torch.empty_like(q_weight), torch.empty_like(k_weight)


def _heads_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, q_weight, k_weight, _, _, ctx.interleaved, ctx.eps, ctx.unit_offset = inputs
    ctx.save_for_backward(None if q_weight is None else qkv, cos, sin, q_weight, k_weight)


def _heads_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor only once
    dqkv, dq_weight, dk_weight = run(rope_heads_backward, dq, dk, dv, *saved, ctx.interleaved, ctx.eps, ctx.unit_offset)
    normed = saved[3] is not None
    return dqkv, None, None, dq_weight if normed else None, dk_weight if normed else None, *[None] * 5


rope_heads_forward.register_autograd(_heads_backward, setup_context=_heads_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, D, R, interleaved in ((bf16, 128, 64, False), (fp16, 256, 32, True), (fp32, 64, 32, False)):
        x, table = meta(2, 4096, 16, D, dtype=dtype), meta(1, 4096, R, dtype=dtype)
        kind = "interleaved" if interleaved else "halves"
        yield Sample(f"rope {D} {kind}", dtype, partial(launch_rotate, x, table, table, interleaved, False))
        yield from _heads_samples(f"{D} {kind}", dtype, table, 16, 4, D, interleaved)
    yield from _heads_samples("256 halves", bf16, meta(1, 4096, 128, dtype=bf16), 8, 4, 256, False)
    # A head that is no power of two, turned in part.
    yield from _heads_samples("80 halves", bf16, meta(1, 4096, 16, dtype=bf16), 32, 32, 80, False)


def _heads_samples(
    name: str, dtype: torch.dtype, table: Tensor, num_heads: int, num_kv_heads: int, D: int, interleaved: bool
) -> Iterator[Sample]:
    B, T, counts = 2, table.shape[1], (num_heads, num_kv_heads, num_kv_heads)
    qkv = meta(B, T, sum(counts) * D, dtype=dtype)
    dq, dk, dv = (meta(B, T, count, D, dtype=dtype) for count in counts)
    for weight in (None, meta(D, dtype=dtype)):
        options = (interleaved, 1e-6, False)
        label = f"{name}{'' if weight is None else ' normed'}"
        forward = partial(_launch_forward, qkv, table, table, weight, weight, num_heads, num_kv_heads, *options)
        yield Sample(f"rope_heads {label}", dtype, forward)
        backward = partial(_launch_backward, dq, dk, dv, qkv, table, table, weight, weight, *options)
        yield Sample(f"rope_heads backward {label}", dtype, backward)
