"""Attention: the public operation.

    o = softmax(scale * q k^T + bias, over the keys that the mask shows) v         (`reference.py` is the definition)

What may attend to what is said by meaning, never by a dense bias, so that a kernel can skip what is masked. `make_mask`:

| argument | query t of row b sees key s only when |
|---|---|
| causal | s <= p(t), where p(t) is t (then T == S), or query_positions_BT[b, t] |
| window = (left, right) | p(t) - left <= s <= p(t) + right; None is no limit |
| segment_ids_BT | segment s == segment t (T == S); on a GPU ids must not fall within a row |
| key_lengths_B | s < key_lengths[b] (padding at the end) |

All of them combine, but for query_positions_BT with segment_ids_BT. Beside the mask, `attention` takes a softcap, learned
sinks, ALiBi slopes or a table of biases by distance (T5), and dropout of the weights. Anything else is refused by name.
A `Mask` is made once per forward pass and shared by all layers. A query that sees no key gets zeros.
Cost: 4 B H T S D FLOPs forward (half of that under a causal mask), 2.5 times that backward (3.5 as computed here: the
scores are made twice, so that no sum depends on the order of programs).

Paths: Triton kernels on a GPU (`forward.py`, `backward.py`). On a CPU causal training in half precision runs
`blocked.py`; softcap, sinks, biases and the log-sum-exp run `reference.py`; all else torch's
scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.attention.backward import launch_backward
from trine.kernels.attention.blocked import blocked_attention
from trine.kernels.attention.bounds import Bounds, Window, make_bounds, segment_bounds
from trine.kernels.attention.forward import launch_forward
from trine.kernels.attention.options import Options
from trine.kernels.attention.reference import attend
from trine.kernels.hardware import INTERPRETING
from trine.kernels.samples import Sample, meta
from trine.kernels.target import uses_triton

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Mask:
    """What may be attended to. Build it with `make_mask`.

    `bounds`: the mask as intervals, for the kernels; None where it is only causal or only full. For a CPU,
    `dense_B1TS`: boolean, True = attend; None where `causal` alone says it. `first_key_BT`: with causal segments that
    are runs of tokens, where each token's segment begins.
    """

    causal: bool
    dense_B1TS: Tensor | None = None
    first_key_BT: Tensor | None = None
    bounds: Bounds | None = None


def make_mask(
    *,
    causal: bool,
    num_keys: int,
    num_queries: int | None = None,
    query_positions_BT: Tensor | None = None,
    segment_ids_BT: Tensor | None = None,
    key_lengths_B: Tensor | None = None,
    window: Window = (None, None),
    device: torch.device | None = None,
) -> Mask:
    """Prepare a mask for `attention`; see the table above. Raises ValueError for a combination outside it.

    `num_queries` (default `num_keys`) and `device` are needed only where no tensor tells them.
    """
    if query_positions_BT is not None and (segment_ids_BT is not None or not (causal or window != (None, None))):
        raise ValueError("query_positions_BT (a cache) needs causal=True or a window, and no segment_ids_BT")
    if segment_ids_BT is not None and segment_ids_BT.shape[1] != num_keys:
        raise ValueError(f"segment ids of length {segment_ids_BT.shape[1]} for {num_keys} keys; they must agree")
    _check_window(causal, window)
    given = next((x for x in (query_positions_BT, segment_ids_BT, key_lengths_B) if x is not None), None)
    if given is None and window == (None, None):
        return Mask(causal=causal)
    if given is not None:
        device = given.device
    elif device is None:
        raise ValueError("a window alone does not tell the device; give device")
    plain_window = window == (None, None) and key_lengths_B is None
    if given is not None and plain_window and not uses_triton(given):
        return _cpu_mask(causal, num_keys, query_positions_BT, segment_ids_BT)
    if query_positions_BT is None:
        query_positions_BT = torch.arange(num_queries or num_keys, device=device)[None]
    start_BT = end_BT = None
    if segment_ids_BT is not None:
        start_BT, end_BT = segment_bounds(segment_ids_BT)
    if key_lengths_B is not None:
        rows = max(key_lengths_B.shape[0], query_positions_BT.shape[0])
        lengths_BT = key_lengths_B[:, None].to(torch.int64).expand(rows, query_positions_BT.shape[1])
        end_BT = lengths_BT if end_BT is None else torch.minimum(end_BT, lengths_BT)
        query_positions_BT = query_positions_BT.expand(rows, -1)
    positions_BT = query_positions_BT if start_BT is None else query_positions_BT.expand(start_BT.shape[0], -1)
    bounds = make_bounds(positions_BT, num_keys, causal=causal, window=window, start_BT=start_BT, end_BT=end_BT)
    if device is not None and (device.type == "cuda" or INTERPRETING):
        return Mask(causal=causal, bounds=bounds)
    return Mask(causal=causal, dense_B1TS=bounds.visible_BTS()[:, None], bounds=bounds)


def _check_window(causal: bool, window: Window) -> None:
    left, right = window
    if any(side is not None and side < 0 for side in window):
        raise ValueError(f"window {window} has a negative side; give the number of keys before and after, or None")
    if causal and right not in (None, 0):
        raise ValueError(f"window {window} looks ahead but causal=True forbids it; give ({left}, 0)")


def _cpu_mask(causal: bool, num_keys: int, query_positions_BT: Tensor | None, segment_ids_BT: Tensor | None) -> Mask:
    if query_positions_BT is not None:
        keys_S = torch.arange(num_keys, device=query_positions_BT.device)
        return Mask(causal=True, dense_B1TS=(keys_S <= query_positions_BT[..., None])[:, None])
    assert segment_ids_BT is not None
    if bool((segment_ids_BT == segment_ids_BT[:, :1]).all()):
        return Mask(causal=causal)  # one segment a row: nothing to hide
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if not causal:
        return Mask(causal=False, dense_B1TS=same_BTS[:, None])
    return Mask(causal=True, dense_B1TS=same_BTS.tril()[:, None], first_key_BT=_segment_starts(segment_ids_BT))


def _segment_starts(segment_ids_BT: Tensor) -> Tensor | None:
    """Where the segment of each token begins; None unless ids ascend, for then an id might return after a gap."""
    if bool((segment_ids_BT[:, 1:] < segment_ids_BT[:, :-1]).any()):
        return None
    return segment_bounds(segment_ids_BT)[0]


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

    `scale` defaults to D**-0.5. `dropout_p` drops attention weights (training only; the caller passes 0 otherwise); the
    draw is repeated by torch.manual_seed. `sinks_H` and `relative_bias_HR` (R = T + S - 1, entry s - t + T - 1) get
    gradients, `alibi_slopes_H` does not. Raises ValueError for mixed dtypes, head counts that do not divide, a causal
    mask with T != S, and whatever else is not supported, by name.
    """
    extras = softcap is not None or any(x is not None for x in (sinks_H, alibi_slopes_H, relative_bias_HR))
    if not uses_triton(q_BHTD) and not extras:
        _check(q_BHTD, k_BKSD, v_BKSD, mask, dropout_p)
        return _cpu_attention(q_BHTD, k_BKSD, v_BKSD, mask, scale, dropout_p)
    return attention_with_lse(
        q_BHTD,
        k_BKSD,
        v_BKSD,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        softcap=softcap,
        sinks_H=sinks_H,
        alibi_slopes_H=alibi_slopes_H,
        relative_bias_HR=relative_bias_HR,
    )[0]


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

    It is -inf where a query sees no key.
    """
    _check(q_BHTD, k_BKSD, v_BKSD, mask, dropout_p)
    _check_extras(q_BHTD, k_BKSD, softcap, sinks_H, alibi_slopes_H, relative_bias_HR)
    if not uses_triton(q_BHTD):
        o_BHTD, lse_BHT = attend(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            visible_BTS=_visible(mask, q_BHTD, k_BKSD),
            scale=scale,
            softcap=softcap,
            sinks_H=sinks_H,
            alibi_slopes_H=alibi_slopes_H,
            relative_bias_HR=relative_bias_HR,
            dropout_p=dropout_p,
        )
        return o_BHTD, lse_BHT.detach()
    if q_BHTD.shape[3] > MAX_HEAD_DIM or q_BHTD.dtype == torch.float64:
        raise ValueError(
            f"head size {q_BHTD.shape[3]} in {q_BHTD.dtype} is not supported by the kernel; at most {MAX_HEAD_DIM}, in "
            "float32, bfloat16 or float16"
        )
    bounds = mask.bounds or _plain_bounds(mask, q_BHTD, k_BKSD)
    seed = None
    if dropout_p:
        # Drawn on the CPU: torch.manual_seed repeats it, activation checkpointing restores it, no device is waited for.
        seed = torch.randint(2**31, (1,), dtype=torch.int64).to(q_BHTD.device)
    o_BHTD, lse_BHT = attention_forward(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BKSD, v_BKSD)),
        bounds.low_BT,
        bounds.high_BT,
        bounds.first_BS,
        bounds.last_BS,
        None if sinks_H is None else sinks_H.contiguous(),
        None if alibi_slopes_H is None else alibi_slopes_H.contiguous(),
        None if relative_bias_HR is None else relative_bias_HR.contiguous(),
        seed,
        bounds.lower,
        q_BHTD.shape[3] ** -0.5 if scale is None else scale,
        softcap or 0.0,
        dropout_p,
    )
    return o_BHTD, lse_BHT


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

    Sequence i holds the queries cu_seqlens_q[i] <= t < cu_seqlens_q[i + 1] (integers, ascending from 0 to N), and the
    keys likewise (default: the same). Where it has more keys than queries, its last query stands at its last key.
    ALiBi needs equal queries and keys.
    """
    _check_window(causal, window)
    if cu_seqlens_k is not None and alibi_slopes_H is not None:
        raise ValueError("alibi_slopes_H with cu_seqlens_k is not supported; leave one out")
    if cu_seqlens_k is None and len(q_NHD) != len(k_MKD):
        raise ValueError(f"{len(q_NHD)} queries and {len(k_MKD)} keys need cu_seqlens_k")
    ends_q = cu_seqlens_q.to(torch.int64)
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.to(torch.int64)
    places_N = torch.arange(len(q_NHD), device=q_NHD.device)
    sequence_N = torch.searchsorted(ends_q, places_N, right=True) - 1
    start_N, end_N = ends_k[sequence_N], ends_k[sequence_N + 1]
    # The last query of a sequence stands at its last key.
    position_N = places_N - ends_q[sequence_N + 1] + end_N
    bounds = make_bounds(
        position_N[None],
        len(k_MKD),
        causal=causal,
        window=window,
        start_BT=start_N[None],
        end_BT=torch.maximum(end_N, start_N)[None],
    )
    dense = None if uses_triton(q_NHD) else bounds.visible_BTS()[:, None]
    o_BHTD = attention(
        *(x.transpose(0, 1)[None] for x in (q_NHD, k_MKD, v_MKD)),
        mask=Mask(causal=False, dense_B1TS=dense, bounds=bounds),
        scale=scale,
        dropout_p=dropout_p,
        softcap=softcap,
        sinks_H=sinks_H,
        alibi_slopes_H=alibi_slopes_H,
    )
    return o_BHTD[0].transpose(0, 1)


def _plain_bounds(mask: Mask, q_BHTD: Tensor, k_BKSD: Tensor) -> Bounds:
    positions_BT = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)[None]
    return make_bounds(positions_BT, k_BKSD.shape[2], causal=mask.causal)


def _visible(mask: Mask, q_BHTD: Tensor, k_BKSD: Tensor) -> Tensor | None:
    if mask.dense_B1TS is not None:
        return mask.dense_B1TS[:, 0]
    return _plain_bounds(mask, q_BHTD, k_BKSD).visible_BTS() if mask.causal else None


def _cpu_attention(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, scale: float | None, dropout_p: float
) -> Tensor:
    blocks_fit = mask.causal and mask.bounds is None and (mask.dense_B1TS is None or mask.first_key_BT is not None)
    if blocks_fit and _trains_on_cpu(q_BHTD) and not dropout_p:
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
    return q_BHTD.device.type == "cpu" and half and q_BHTD.requires_grad and torch.is_grad_enabled()


def _check(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, dropout_p: float) -> None:
    if not q_BHTD.dtype == k_BKSD.dtype == v_BKSD.dtype:
        raise ValueError(f"q, k, v have dtypes {q_BHTD.dtype}, {k_BKSD.dtype}, {v_BKSD.dtype}; cast them to one")
    if any(x.dim() != 4 for x in (q_BHTD, k_BKSD, v_BKSD)) or k_BKSD.shape != v_BKSD.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTD, k_BKSD, v_BKSD))
        raise ValueError(f"q, k, v have shapes {shapes}; expected [B, H, T, D] and twice [B, K, S, D]")
    if q_BHTD.shape[0] != k_BKSD.shape[0] or q_BHTD.shape[3] != k_BKSD.shape[3]:
        raise ValueError(f"q {tuple(q_BHTD.shape)} and k {tuple(k_BKSD.shape)} differ in batch or head size")
    H, K = q_BHTD.shape[1], k_BKSD.shape[1]
    if K == 0 or H % K:
        raise ValueError(f"{H} query heads do not divide into groups over {K} key/value heads")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    T, S = q_BHTD.shape[2], k_BKSD.shape[2]
    if mask.causal and mask.dense_B1TS is None and mask.bounds is None and T != S:
        raise ValueError(
            f"a causal mask without positions needs as many queries as keys, not {T} and {S}; give query_positions_BT "
            "to make_mask"
        )
    if mask.bounds is not None and (mask.bounds.low_BT.shape[1], mask.bounds.first_BS.shape[1]) != (T, S):
        made = (mask.bounds.low_BT.shape[1], mask.bounds.first_BS.shape[1])
        raise ValueError(f"the mask was made for {made[0]} queries and {made[1]} keys, not {T} and {S}")


def _check_extras(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    softcap: float | None,
    sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None,
    relative_bias_HR: Tensor | None,
) -> None:
    H, distances = q_BHTD.shape[1], q_BHTD.shape[2] + k_BKSD.shape[2] - 1
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
    for name, tensor, shape in (
        ("sinks_H", sinks_H, (H,)),
        ("alibi_slopes_H", alibi_slopes_H, (H,)),
        ("relative_bias_HR", relative_bias_HR, (H, distances)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if alibi_slopes_H is not None and alibi_slopes_H.requires_grad:
        raise ValueError("alibi_slopes_H requires a gradient, which is not supported; detach it")
    if alibi_slopes_H is not None and relative_bias_HR is not None:
        raise ValueError("alibi_slopes_H and relative_bias_HR together are not supported; add the slopes to the table")


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("trine::attention_forward", mutates_args=())
def attention_forward(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    low_BT: Tensor,
    high_BT: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    sinks_H: Tensor | None,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
    seed: Tensor | None,
    lower: bool,
    scale: float,
    softcap: float,
    drop: float,
) -> tuple[Tensor, Tensor]:
    """The registered operation: o_BHTD (laid out as [B, T, H, D]) and lse_BHT. Fields of `Options`, in order."""
    options = Options(low_BT, high_BT, first_BS, last_BS, lower, scale, softcap, drop, sinks_H, slopes_H, bias_HR, seed)
    return launch_forward(q_BHTD, k_BKSD, v_BKSD, options)


@attention_forward.register_fake
def _(q_BHTD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, H, T, D = q_BHTD.shape
    return q_BHTD.new_empty(B, T, H, D).transpose(1, 2), q_BHTD.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("trine::attention_backward", mutates_args=())
def attention_backward(
    do_BHTD: Tensor,
    o_BHTD: Tensor,
    lse_BHT: Tensor,
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    low_BT: Tensor,
    high_BT: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    sinks_H: Tensor | None,
    slopes_H: Tensor | None,
    bias_HR: Tensor | None,
    seed: Tensor | None,
    lower: bool,
    scale: float,
    softcap: float,
    drop: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered operation: dq, dk, dv, dbias_HR (empty without a table) and rowsum(dO * O) as fp32 [B, H, T]."""
    options = Options(low_BT, high_BT, first_BS, last_BS, lower, scale, softcap, drop, sinks_H, slopes_H, bias_HR, seed)
    do_BHTD = do_BHTD if do_BHTD.stride(-1) == 1 else do_BHTD.contiguous()
    return launch_backward(q_BHTD, k_BKSD, v_BKSD, o_BHTD, lse_BHT, do_BHTD, options)


@attention_backward.register_fake
def _(
    do_BHTD: Tensor, o_BHTD: Tensor, lse_BHT: Tensor, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias_HR = rest[6]
    dq_BHTD, dk_BKSD, dv_BKSD = (
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q_BHTD, k_BKSD, v_BKSD)
    )
    dbias = q_BHTD.new_empty(0 if bias_HR is None else bias_HR.shape, dtype=torch.float32)
    return dq_BHTD, dk_BKSD, dv_BKSD, dbias, torch.empty_like(lse_BHT)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.numbers = inputs[11:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do_BHTD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, o_BHTD, lse_BHT = ctx.saved_tensors
    dq, dk, dv, dbias_HR, delta_BHT = attention_backward(do_BHTD, o_BHTD, lse_BHT, *inputs, *ctx.numbers)
    sinks_H, bias_HR = inputs[7], inputs[9]
    dsinks_H = None
    if sinks_H is not None:
        weight_BHT = torch.exp(sinks_H.float()[:, None] - lse_BHT)
        dsinks_H = -(weight_BHT * delta_BHT).sum(dim=(0, 2)).to(sinks_H.dtype)
    dbias = None if bias_HR is None else dbias_HR.to(bias_HR.dtype)
    return dq, dk, dv, None, None, None, None, dsinks_H, None, dbias, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    for dtype, D in (
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float16, 128),
        (torch.float32, 64),
        (torch.float32, 128),
    ):
        yield from _samples(f"causal {D}", dtype, D, {})
    half = torch.bfloat16
    yield from _samples("window 128", half, 128, {"lower": True})
    yield from _samples("padded head 80", half, 80, {"lower": True})
    yield from _samples("window softcap 256", half, 256, {"lower": True, "softcap": 50.0})
    yield from _samples("window sinks 64", half, 64, {"lower": True, "sinks_H": meta(16, dtype=half)})
    yield from _samples("alibi 128", half, 128, {"slopes_H": meta(16)})
    yield from _samples(
        "bias dropout 64", half, 64, {"bias_HR": meta(16, 8191), "seed": meta(1, dtype=torch.int64), "drop": 0.1}
    )


def _samples(name: str, dtype: torch.dtype, D: int, extra: dict[str, Any]) -> Iterator[Sample]:
    B, H, K, T = 2, 16, 4, 4096
    bounds = [meta(1, T, dtype=torch.int32) for _ in range(4)]
    fields: dict[str, Any] = {
        "lower": False,
        "scale": D**-0.5,
        "softcap": 0.0,
        "drop": 0.0,
        "sinks_H": None,
        "slopes_H": None,
        "bias_HR": None,
        "seed": None,
    }
    options = Options(*bounds, **(fields | extra))
    q, k = (meta(B, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K))
    half = dtype != torch.float32
    yield Sample(f"attention {name}", dtype, partial(launch_forward, q, k, k, options), tensor_cores=half)
    lse = meta(B, H, T)
    yield Sample(f"attention backward {name}", dtype, partial(launch_backward, q, k, k, q, lse, q, options))
