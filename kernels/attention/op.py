"""Attention: the public operation.

    o = softmax(scale * q k^T + bias, over the keys that the mask shows) v         (`reference.py` is the definition)

What may attend to what is a `Mask` (`mask.py`): causal or full, window, documents, padding, cache positions. Beside it
`attention` takes a softcap, learned sinks, ALiBi slopes or a table of biases by distance (T5), and dropout of the
weights. `support.py` says what goes together; the rest is refused by name. A query that sees no key gets zeros.

Cost: 4 B H T S D FLOPs forward (half of that under a causal mask), 2.5 times that backward (3.5 as computed here: the
scores are made twice, so that no sum depends on the order of programs). Bytes: q, k, v and o once forward; nothing of
size T x S is ever stored.

Paths: Triton kernels on a GPU (`forward.py`, `backward.py`). On a CPU causal training in half precision runs
`blocked.py`; softcap, sinks, biases and the log-sum-exp run `reference.py`; all else torch's
scaled_dot_product_attention.
Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691); Milakov and Gimelshein 2018 (online softmax, 1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.attention.backward import launch_backward
from trine.kernels.attention.blocked import blocked_attention
from trine.kernels.attention.bounds import Window
from trine.kernels.attention.forward import launch_forward
from trine.kernels.attention.mask import Mask, make_mask, packed_mask, visible_keys
from trine.kernels.attention.options import Options
from trine.kernels.attention.reference import attend
from trine.kernels.attention.registration import attention_forward
from trine.kernels.attention.support import check_features, check_kernel, cpu_path
from trine.kernels.operation import run
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton

__all__ = ["Mask", "attention", "attention_packed", "attention_with_lse", "make_mask", "samples"]
# Rows of the batch and heads are the second and third dimension of a launch.
_MAX_GRID = 65535


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None,
    relative_bias_HR: Tensor | None = None,
) -> Tensor:
    """Attention of H query heads over K key/value heads (H a multiple of K); returns o_BHTD in the dtype of q.

    `scale` (positive) defaults to D**-0.5. `dropout_p` drops attention weights (training only; the caller passes 0
    otherwise); the draw is repeated by torch.manual_seed. `sinks_H` and `relative_bias_HR` (R = T + S - 1, entry
    s - t + T - 1) get gradients, `alibi_slopes_H` does not. Raises ValueError for mixed dtypes, head counts that do not
    divide, a causal mask with T != S, and whatever else is not supported, by name.
    """
    extras = softcap is not None or any(x is not None for x in (sinks_H, alibi_slopes_H, relative_bias_HR))
    if not uses_triton(q_BHTD) and not extras:
        features = _check(q_BHTD, k_BKSD, v_BKSD, mask, scale, dropout_p, frozenset())
        return _cpu_attention(q_BHTD, k_BKSD, v_BKSD, mask, scale, dropout_p, features)
    extra = (softcap, sinks_H, alibi_slopes_H, relative_bias_HR)
    return _attention(q_BHTD, k_BKSD, v_BKSD, mask, scale, dropout_p, *extra, frozenset())[0]


def attention_with_lse(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None,
    relative_bias_HR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, with the natural log-sum-exp of each query's scores, sinks included: fp32 [B, H, T], no gradient.

    It is -inf where a query sees no key. In fp64 (CPU only) it is fp64.
    """
    extra = (softcap, sinks_H, alibi_slopes_H, relative_bias_HR)
    return _attention(q_BHTD, k_BKSD, v_BKSD, mask, scale, dropout_p, *extra, frozenset({"lse"}))


def attention_packed(
    q_NHD: Tensor,
    k_MKD: Tensor,
    v_MKD: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    causal: bool,
    window: Window = (None, None),
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None,
) -> Tensor:
    """Attention inside each of several sequences that lie end to end, without padding; returns o_NHD.

    Sequence i holds the queries cu_seqlens_q[i] <= t < cu_seqlens_q[i + 1] (int32 or int64, ascending from 0 to at most
    N; on a GPU the values are not looked at), and the keys likewise (default: the same). Where it has more keys than
    queries, its last query stands at its last key. Queries past the last sequence get zeros. Raises ValueError as
    `attention` does, and for offsets of wrong shape or dtype.
    """
    if any(x.dim() != 3 for x in (q_NHD, k_MKD, v_MKD)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_NHD, k_MKD, v_MKD))
        raise ValueError(f"q, k, v have shapes {shapes}; expected [N, H, D] and twice [M, K, D]")
    mask = packed_mask(len(q_NHD), len(k_MKD), cu_seqlens_q, cu_seqlens_k, causal=causal, window=window)
    o_BHTD = attention(
        *(x.transpose(0, 1)[None] for x in (q_NHD, k_MKD, v_MKD)),
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        softcap=softcap,
        sinks_H=sinks_H,
        alibi_slopes_H=alibi_slopes_H,
    )
    return o_BHTD[0].transpose(0, 1)


def _attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None,
    dropout_p: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None,
    relative_bias_HR: Tensor | None,
    features: frozenset[str],
) -> tuple[Tensor, Tensor]:
    """The kernels on a GPU, the reference on a CPU."""
    features |= _check_extras(q_BHTD, k_BKSD, softcap, sinks_H, alibi_slopes_H, relative_bias_HR)
    _check(q_BHTD, k_BKSD, v_BKSD, mask, scale, dropout_p, features)
    if not uses_triton(q_BHTD):
        o_BHTD, lse_BHT = attend(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            visible_BTS=visible_keys(mask, q_BHTD, k_BKSD),
            scale=scale,
            softcap=softcap,
            sinks_H=sinks_H,
            alibi_slopes_H=alibi_slopes_H,
            position_BT=mask.position_BT,
            relative_bias_HR=relative_bias_HR,
            dropout_p=dropout_p,
        )
        return o_BHTD, lse_BHT.detach()
    check_kernel(q_BHTD.shape[3], q_BHTD.dtype)
    if max(q_BHTD.shape[:2]) > _MAX_GRID:
        raise ValueError(f"{q_BHTD.shape[0]} rows of {q_BHTD.shape[1]} heads; at most {_MAX_GRID} of both")
    seed = None
    if dropout_p:
        # Drawn on the CPU: torch.manual_seed repeats it, activation checkpointing restores it, no device is waited for.
        seed = torch.randint(2**31, (1,), dtype=torch.int64).to(q_BHTD.device, non_blocking=True)
    bounds = mask.bounds
    result: tuple[Tensor, Tensor] = run(
        attention_forward,
        q_BHTD,
        k_BKSD,
        v_BKSD,
        *((None,) * 4 if bounds is None else (bounds.low_BT, bounds.high_BT, bounds.first_BS, bounds.last_BS)),
        mask.position_BT,
        *(None if x is None else x.contiguous() for x in (sinks_H, alibi_slopes_H, relative_bias_HR)),
        seed,
        mask.causal,
        bounds is not None and bounds.lower,
        bounds is None or bounds.ordered,
        q_BHTD.shape[3] ** -0.5 if scale is None else scale,
        softcap or 0.0,
        dropout_p,
    )
    return result


def _cpu_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None,
    dropout_p: float,
    features: frozenset[str],
) -> Tensor:
    if cpu_path(features, trains_in_half=_trains_on_cpu(q_BHTD)) == "blocked":
        scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
        return blocked_attention(q_BHTD, k_BKSD, v_BKSD, scale=scale, first_key_BT=mask.first_key_BT)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        attn_mask=mask.dense_B1TS,
        dropout_p=dropout_p,
        is_causal=mask.causal and mask.dense_B1TS is None,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BKSD.shape[1],
    )


def _trains_on_cpu(q_BHTD: Tensor) -> bool:
    half = q_BHTD.dtype in (torch.bfloat16, torch.float16)
    trains = q_BHTD.requires_grad and torch.is_grad_enabled() and q_BHTD.numel() > 0
    return q_BHTD.device.type == "cpu" and half and trains


def _check(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None,
    dropout_p: float,
    features: frozenset[str],
) -> frozenset[str]:
    """All features of a call. Raises ValueError for what is not supported."""
    if not q_BHTD.dtype == k_BKSD.dtype == v_BKSD.dtype or not q_BHTD.is_floating_point():
        raise ValueError(
            f"q, k, v have dtypes {q_BHTD.dtype}, {k_BKSD.dtype}, {v_BKSD.dtype}; cast them to one floating-point dtype"
        )
    if any(x.dim() != 4 for x in (q_BHTD, k_BKSD, v_BKSD)) or k_BKSD.shape != v_BKSD.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTD, k_BKSD, v_BKSD))
        raise ValueError(f"q, k, v have shapes {shapes}; expected [B, H, T, D] and twice [B, K, S, D]")
    B, H, T, D = q_BHTD.shape
    K, S = k_BKSD.shape[1:3]
    if (k_BKSD.shape[0], k_BKSD.shape[3]) != (B, D):
        raise ValueError(f"q {tuple(q_BHTD.shape)} and k {tuple(k_BKSD.shape)} differ in batch or head size")
    if K == 0 or H % K:
        raise ValueError(f"{H} query heads do not divide into groups over {K} key/value heads")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    if D == 0 or (scale is not None and not scale > 0):
        raise ValueError(f"scale is {scale} for head size {D}; both must be positive")
    present = {"cross": T != S, "grouped": H != K, "dropout": dropout_p > 0}
    features |= mask.features | {name for name, there in present.items() if there}
    if mask.causal and mask.dense_B1TS is None and mask.bounds is None and T != S:
        raise ValueError(
            f"a causal mask without positions needs as many queries as keys, not {T} and {S}; give query_positions_BT "
            "to make_mask"
        )
    check_features(features)
    _check_mask(mask, B, T, S)
    return features


def _check_mask(mask: Mask, B: int, T: int, S: int) -> None:
    if mask.bounds is not None:
        rows, made = mask.bounds.low_BT.shape[0], (mask.bounds.low_BT.shape[1], mask.bounds.first_BS.shape[1])
    elif mask.dense_B1TS is not None:
        rows, made = mask.dense_B1TS.shape[0], (mask.dense_B1TS.shape[2], mask.dense_B1TS.shape[3])
    else:
        return
    if made != (T, S) or rows not in (1, B):
        raise ValueError(
            f"the mask was made for {rows} rows of {made[0]} queries and {made[1]} keys, not for {B} of {T} and {S}"
        )


def _check_extras(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    softcap: float | None,
    sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None,
    relative_bias_HR: Tensor | None,
) -> frozenset[str]:
    """Which of them are there. Raises ValueError for one of wrong value, shape or dtype."""
    if q_BHTD.dim() != 4 or k_BKSD.dim() != 4:
        return frozenset()  # `_check` says so
    H, distances = q_BHTD.shape[1], max(0, q_BHTD.shape[2] + k_BKSD.shape[2] - 1)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
    features = {"softcap"} if softcap is not None else set()
    for feature, name, tensor, shape in (
        ("sinks", "sinks_H", sinks_H, (H,)),
        ("alibi", "alibi_slopes_H", alibi_slopes_H, (H,)),
        ("relative_bias", "relative_bias_HR", relative_bias_HR, (H, distances)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected floating point {shape}")
        features.add(feature)
    if alibi_slopes_H is not None and alibi_slopes_H.requires_grad:
        raise ValueError("alibi_slopes_H requires a gradient, which is not supported; detach it")
    return frozenset(features)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    half, single = torch.bfloat16, torch.float32
    for dtype, D in ((half, 64), (half, 128), (half, 256), (torch.float16, 128), (single, 64), (single, 128)):
        yield from _samples(f"causal {D}", dtype, D, causal=True)
    yield from _samples("window 128", half, 128, window=True)
    yield from _samples("padded head 80", half, 80, window=True)
    yield from _samples("window softcap 256", half, 256, window=True, softcap=50.0)
    yield from _samples("window sinks 64", half, 64, window=True, sinks_H=meta(16, dtype=half))
    yield from _samples("alibi 128", half, 128, causal=True, slopes_H=meta(16))
    yield from _samples("dropout 128", half, 128, causal=True, seed=meta(1, dtype=torch.int64), drop=0.1)
    yield from _samples("dropout 256", half, 256, causal=True, seed=meta(1, dtype=torch.int64), drop=0.1)
    yield from _samples("bias 64", half, 64, bias_HR=meta(16, 8191))
    everything: dict[str, Any] = {"softcap": 50.0, "seed": meta(1, dtype=torch.int64), "drop": 0.1}
    everything |= {"sinks_H": meta(16, dtype=half), "position_BT": meta(1, 4096, dtype=torch.int32)}
    for D in (64, 128):
        yield from _samples(f"everything {D}", half, D, window=True, slopes_H=meta(16), **everything)


def _samples(
    name: str, dtype: torch.dtype, D: int, causal: bool = False, window: bool = False, **extra: Any
) -> Iterator[Sample]:
    B, H, K, T = 2, 16, 4, 4096
    names = ("low_BT", "high_BT", "first_BS", "last_BS")
    intervals = {name: meta(1, T, dtype=torch.int32) if window else None for name in names}
    fields: dict[str, Any] = dict.fromkeys(("position_BT", "sinks_H", "slopes_H", "bias_HR", "seed"))
    numbers: dict[str, Any] = {
        "causal": causal,
        "lower": window,
        "ordered": True,
        "scale": D**-0.5,
        "softcap": 0.0,
        "drop": 0.0,
    }
    options = Options(**{**intervals, **fields, **numbers, **extra})
    q, k = (meta(B, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K))
    lse = meta(B, H, T)
    half = dtype != torch.float32
    yield Sample(f"attention {name}", dtype, partial(launch_forward, q, k, k, options), tensor_cores=half)
    yield Sample(f"attention backward {name}", dtype, partial(launch_backward, q, k, k, q, lse, q, options))
