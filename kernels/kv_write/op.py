"""From q, k, v, joined in one product or apart, to attention over a paged cache, in one pass.

Every head of q and k is normalised (where there are norm weights) and turned by its token's angles (where there are
tables), as `rope_heads` does; q is returned, k and v go to their slots of the pool. A slot is block * S + place in the
block; -1 keeps a token out of the cache. A pool of int8 or fp8 e4m3 holds x / scale with one fp32 scale for each slot
and head, the largest |x| of the head over 127 or 448; int8 is rounded to nearest, ties to even.

Shapes: N tokens, H query heads, K key/value heads, D head dimension, R pairs that are turned (2R <= D), P blocks of S
slots. Bytes: (H + 2 K) D b read and H D b + 2 K D c written, for numbers of b and pools of c bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trine.kernels.hardware import CHECKING
from trine.kernels.kv_write.kernel import write_kernel
from trine.kernels.launch import ceil_div, launch, next_power_of_2, result_dtype, rounded
from trine.kernels.operation import run
from trine.kernels.rms_norm import rms_norm
from trine.kernels.rope.op import rope
from trine.kernels.rope.rotation import angle_arguments, blocks
from trine.kernels.samples import Sample, meta
from trine.kernels.target import Target, target_of, uses_triton
from trine.kernels.tuning import Config, Shape, Tunable

Parts = tuple[Tensor, Tensor, Tensor]
# Largest magnitude that a number of a quantized pool can have.
TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def write_kv(
    qkv_NE: Tensor | Parts,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    slots_N: Tensor,
    *,
    num_heads: int,
    cos_NR: Tensor | None = None,
    sin_NR: Tensor | None = None,
    interleaved: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    k_scale_PSK: Tensor | None = None,
    v_scale_PSK: Tensor | None = None,
    slots_checked: bool = False,
) -> Tensor:
    """Write k and v of every token, and return q_NHD in the dtype of qkv; no gradients.

    `qkv_NE`: one product, E = (H + 2 K) D, or its parts [N, H D], [N, K D], [N, K D], each with rows at any stride.
    `slots_N`: int64, -1 for none. `cos_NR`, `sin_NR` in the dtype of qkv, both or neither (no rotation). Norm weights
    [D] of any float dtype, both or neither. Scales fp32 [P, S, K], for a quantized pool and only there; they are
    written too. Raises ValueError for what does not fit, by name; slots outside the pool, or taken twice, on a CPU, and
    on a GPU with TRINE_CHECK_KERNELS=1, unless `slots_checked` says that the caller has seen to them (tokens that may
    share a slot are those whose keys nobody reads).
    """
    _check(qkv_NE, k_cache_PSKD, v_cache_PSKD, slots_N, num_heads)
    parts = parts_of(qkv_NE, num_heads, *k_cache_PSKD.shape[2:])
    q_NE = parts[0]
    _check_parts(q_NE, k_cache_PSKD, cos_NR, sin_NR, q_norm_weight, k_norm_weight)
    _check_scales(q_NE, k_cache_PSKD, k_scale_PSK, v_scale_PSK)
    if cos_NR is None or sin_NR is None:
        cos_NR = sin_NR = q_NE.new_empty(len(q_NE), 0)
    arguments = (
        k_cache_PSKD, v_cache_PSKD, slots_N, cos_NR, sin_NR, q_norm_weight, k_norm_weight, k_scale_PSK, v_scale_PSK,
        num_heads, interleaved, eps, unit_offset,
    )  # fmt: skip
    # How many tokens are kept, and the check of the slots, depend on the slots' values: a compiler cannot trace either,
    # so a compiled caller takes the registered operation on a CPU too.
    if uses_triton(q_NE) or torch.compiler.is_compiling():
        q_NHD: Tensor = run(kv_write, *parts, *arguments, slots_checked)
        return q_NHD
    if not slots_checked:
        check_slots(k_cache_PSKD, slots_N)
    return write_kv_reference(parts, *arguments)


def parts_of(qkv_NE: Tensor | Parts, num_heads: int, num_kv_heads: int, head_dim: int) -> Parts:
    """q, k, v as rows: views of a joined product, or what was given."""
    if not isinstance(qkv_NE, Tensor):
        return qkv_NE
    q, k, v = qkv_NE.split([count * head_dim for count in (num_heads, num_kv_heads, num_kv_heads)], dim=1)
    return q, k, v


def write_kv_reference(
    qkv_NE: Tensor | Parts,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    slots_N: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    k_scale_PSK: Tensor | None,
    v_scale_PSK: Tensor | None,
    num_heads: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> Tensor:
    """The same by the separate operations; it is the CPU path, and the definition in float64."""
    K, D = k_cache_PSKD.shape[2:]
    q, k, v = (x.unflatten(-1, (-1, D)) for x in parts_of(qkv_NE, num_heads, K, D))
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps, unit_offset=unit_offset)
        k = rms_norm(k, k_norm_weight, eps, unit_offset=unit_offset)
    q, k = (rope(x[None], cos_NR[None], sin_NR[None], interleaved=interleaved)[0] for x in (q, k))
    kept = slots_N >= 0
    places = slots_N[kept]
    for x, cache, scales in ((k, k_cache_PSKD, k_scale_PSK), (v, v_cache_PSKD, v_scale_PSK)):
        x = x[kept]
        if scales is not None:
            x, scale = quantize(x, cache.dtype)
            scales.view(-1, K)[places] = scale
        cache.view(-1, K, D)[places] = x.to(cache.dtype)
    return q.contiguous()


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in the numbers of a quantized pool (not yet in its dtype), and the fp32 scale of every head."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / TOPS[dtype], 1.0)
    y = x / scale[..., None]
    return (y.round() if dtype == torch.int8 else y), scale.float()


def _check(qkv: Tensor | Parts, k: Tensor, v: Tensor, slots: Tensor, num_heads: int) -> None:
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(
            f"the caches are {k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}; "
            "expected two [P, S, K, D] of one dtype"
        )
    K, D = k.shape[2:]
    rows = {"qkv": qkv} if isinstance(qkv, Tensor) else dict(zip("qkv", qkv, strict=True))
    widths = {"qkv": (num_heads + 2 * K) * D, "q": num_heads * D, "k": K * D, "v": K * D}
    first = next(iter(rows.values()))
    for name, x in rows.items():
        if x.dim() != 2 or x.shape[1] != widths[name] or len(x) != len(first):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected [N, {widths[name]}] for {num_heads} heads, {K} key/value "
                f"heads and head dimension {D}"
            )
        if x.dtype != first.dtype:
            raise ValueError(f"{name} is {x.dtype} but q is {first.dtype}; make them equal")
    if slots.dtype != torch.int64 or slots.shape != first.shape[:1]:
        raise ValueError(f"slots are {slots.dtype} {tuple(slots.shape)}; expected int64 ({len(first)},)")
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.stride(3) != 1 or cache.stride(2) != D or cache.stride(0) != cache.shape[1] * cache.stride(1):
            raise ValueError(f"{name} has strides {cache.stride()}; heads must be dense and slots lie at one stride")
    if uses_triton(first) and first.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{first.dtype} is not supported by the kernel; use float32, bfloat16 or float16")


def _check_parts(
    qkv: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    D = k.shape[3]
    for name, first, second in (("cos and sin", cos, sin), ("q_norm_weight and k_norm_weight", q_weight, k_weight)):
        if (first is None) != (second is None):
            raise ValueError(f"{name} go together; give both or neither")
    if cos is not None and sin is not None:
        if cos.shape != sin.shape or cos.dim() != 2 or len(cos) != len(qkv) or 2 * cos.shape[1] > D:
            raise ValueError(
                f"cos and sin have shapes {tuple(cos.shape)}, {tuple(sin.shape)}; expected [{len(qkv)}, R], 2R at most "
                f"{D}"
            )
        if not qkv.dtype == cos.dtype == sin.dtype:
            raise ValueError(f"qkv is {qkv.dtype} but cos and sin are {cos.dtype}, {sin.dtype}; make them equal")
    for name, weight in (("q_norm_weight", q_weight), ("k_norm_weight", k_weight)):
        if weight is not None and (weight.shape != (D,) or not weight.is_floating_point()):
            raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}; expected floating point ({D},)")


def _check_scales(qkv: Tensor, k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    quantized = k.dtype in TOPS
    if not quantized and k.dtype != qkv.dtype:
        raise ValueError(f"qkv is {qkv.dtype} but the caches are {k.dtype}; make them equal, or the caches quantized")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scales is not None) != quantized:
            raise ValueError(f"{name} is {'missing for' if quantized else 'given with'} caches of {k.dtype}")
        if scales is not None and (
            scales.dtype != torch.float32 or scales.shape != k.shape[:3] or not scales.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {scales.dtype} {tuple(scales.shape)}; expected contiguous float32 {tuple(k.shape[:3])}"
            )


def check_slots(k_cache_PSKD: Tensor, slots_N: Tensor) -> None:
    """Raise ValueError for a slot outside the pool, or one that two tokens would share."""
    slots, size = slots_N[slots_N >= 0], k_cache_PSKD.shape[0] * k_cache_PSKD.shape[1]
    outside = slots_N[(slots_N < -1) | (slots_N >= size)]
    if len(outside):
        raise ValueError(f"slot {int(outside[0])} is outside the pool of {size} slots")
    if len(slots.unique()) != len(slots):
        raise ValueError("two tokens have one slot; every slot can be written once in a call")


# --- Triton -----------------------------------------------------------------------------------------------------------


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    # Few tokens are the usual case: small blocks, so that there are programs for every multiprocessor.
    rows = 4 if target.interpreted or shape["N"] < 4096 else 16
    return Config({"ROWS": rows, **blocks(shape)}, num_warps=4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    return [Config({"ROWS": rows, **blocks(shape)}, warps, 1) for rows in (2, 4, 8, 16, 32) for warps in (1, 2, 4, 8)]


WRITE = Tunable("kv_write", _rule, _candidates)


def _launch(
    q_NE: Tensor,
    k_NE: Tensor,
    v_NE: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    slots_N: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    k_scale_PSK: Tensor | None,
    v_scale_PSK: Tensor | None,
    num_heads: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
) -> Tensor:
    """q_NHD; in the interpreter pools of bf16 and fp8 are written through fp32 copies (see `launch.py`)."""
    N, (K, D) = len(q_NE), k_cache_PSKD.shape[2:]
    rows = [x if x.stride(1) == 1 else x.contiguous() for x in (q_NE, k_NE, v_NE)]
    q_NHD = q_NE.new_empty(N, num_heads, D, dtype=result_dtype(q_NE.dtype))
    caches = (k_cache_PSKD, v_cache_PSKD)
    pools = [cache.to(result_dtype(cache.dtype)) for cache in caches]
    config = WRITE.pick(q_NE.dtype, target_of(q_NE), N=N * (num_heads + 2 * K), exact_D=D, exact_R=cos_NR.shape[1])
    q_programs, kv_programs = (ceil_div(N * count, config.blocks["ROWS"]) for count in (num_heads, K))
    arguments: dict[str, Any] = {
        **dict(zip(("q_in_ptr", "k_in_ptr", "v_in_ptr"), rows, strict=True)),
        "q_ptr": q_NHD,
        "k_cache_ptr": pools[0],
        "v_cache_ptr": pools[1],
        "k_scale_ptr": k_scale_PSK,
        "v_scale_ptr": v_scale_PSK,
        "slots_ptr": slots_N.contiguous(),
        "q_weight_ptr": None if q_norm_weight is None else q_norm_weight.contiguous(),
        "k_weight_ptr": None if k_norm_weight is None else k_norm_weight.contiguous(),
        **angle_arguments(cos_NR[None], sin_NR[None]),
        "q_in_stride": rows[0].stride(0),
        "k_in_stride": rows[1].stride(0),
        "v_in_stride": rows[2].stride(0),
        "k_slot_stride": pools[0].stride(1),
        "v_slot_stride": pools[1].stride(1),
        "num_tokens": N,
        "num_heads": num_heads,
        "num_kv_heads": K,
        "q_programs": q_programs,
        "k_programs": kv_programs,
        "eps": eps,
        "D": D,
        "INTERLEAVED": interleaved,
        "UNIT_OFFSET": unit_offset,
        "BLOCK_D": next_power_of_2(D),
    }
    launch(write_kernel, (q_programs + 2 * kv_programs,), config, arguments)
    for cache, pool in zip(caches, pools, strict=True):
        if pool is not cache:
            cache.copy_(pool)
    return rounded(q_NHD, q_NE.dtype)


@torch.library.custom_op("trine::kv_write", mutates_args=("k_cache_PSKD", "v_cache_PSKD", "k_scale_PSK", "v_scale_PSK"))
def kv_write(
    q_NE: Tensor,
    k_NE: Tensor,
    v_NE: Tensor,
    k_cache_PSKD: Tensor,
    v_cache_PSKD: Tensor,
    slots_N: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    k_scale_PSK: Tensor | None,
    v_scale_PSK: Tensor | None,
    num_heads: int,
    interleaved: bool,
    eps: float,
    unit_offset: bool,
    slots_checked: bool,
) -> Tensor:
    """The registered operation: q_NHD, contiguous and no view of q; writes caches and scales."""
    if (CHECKING or not q_NE.is_cuda) and not slots_checked:
        check_slots(k_cache_PSKD, slots_N)
    arguments = (
        k_cache_PSKD, v_cache_PSKD, slots_N, cos_NR, sin_NR, q_norm_weight, k_norm_weight, k_scale_PSK, v_scale_PSK,
        num_heads, interleaved, eps, unit_offset,
    )  # fmt: skip
    if uses_triton(q_NE):
        return _launch(q_NE, k_NE, v_NE, *arguments)
    return write_kv_reference((q_NE, k_NE, v_NE), *arguments)


@kv_write.register_fake
def _(q_NE: Tensor, k_NE: Tensor, v_NE: Tensor, k_cache_PSKD: Tensor, *rest: Any) -> Tensor:
    D = k_cache_PSKD.shape[3]
    return q_NE.new_empty(len(q_NE), q_NE.shape[1] // D, D)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    H, K, D, dtype = 32, 8, 128, torch.bfloat16
    nvidia = ("sm_90", "sm_100")
    for N, R, normed, cache, targets in (
        (64, 64, False, dtype, ()),
        (8192, 64, True, dtype, ()),
        (64, 0, False, dtype, ()),
        (64, 16, True, torch.int8, ()),
        (64, 64, False, torch.float8_e4m3fn, nvidia),
    ):
        pool = meta(4096, 16, K, D, dtype=cache)
        scales = None if cache == dtype else meta(4096, 16, K)
        weight, table = meta(D) if normed else None, meta(N, R, dtype=dtype)
        parts = parts_of(meta(N, (H + 2 * K) * D, dtype=dtype), H, K, D)
        slots = meta(N, dtype=torch.int64)
        call = partial(
            _launch, *parts, pool, pool, slots, table, table, weight, weight, scales, scales, H, R == 16, 1e-6, False
        )
        name = f"kv_write {N} R{R}{' normed' * normed}{'' if cache == dtype else f' {cache}'.replace('torch.', '')}"
        yield Sample(name, dtype, call, targets=targets)
