"""The best other implementations of what the kernels do, where they need more than a line; all come with torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trine.benchmarks.kernel_problem import Forward, Inputs, Results


def compiled(function: Callable[..., Results], new: Inputs, *arguments: Any) -> Iterator[tuple[str, Forward]]:
    """`torch.compile` of a formula, on a GPU."""
    if new.on_gpu:
        # A pass of its own may be run twice here, which compiled backwards otherwise refuse.
        from torch._functorch import config

        config.donated_buffer = False
        fast = torch.compile(function, dynamic=False)
        yield "torch.compile", lambda: fast(*arguments)


def attention_peers(
    new: Inputs, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int, ends: Tensor | None
) -> dict[str, Forward]:
    """cuDNN and FlashAttention where the mask is plain; flex_attention and FlashAttention by sequences otherwise.

    `ends`: where packed sequences begin, and N (int64). Keys and values are repeated where a backend has no grouped
    queries of its own.
    """
    if not new.on_gpu:
        return {}
    if window or ends is not None:
        flex = _flex(new, q, k, v, window, ends)
        return {"flex_attention": flex, "flash, by sequences": lambda: _by_sequences(q, k, v, causal, window, ends)}
    group = q.shape[1] // k.shape[1]

    def sdpa(backend: SDPBackend, repeat: bool) -> Tensor:
        keys, values = (x.repeat_interleave(group, dim=1) if repeat else x for x in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, keys, values, is_causal=causal, enable_gqa=group > 1 and not repeat
            )

    peers: dict[str, Forward] = {
        "cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, False),
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION, False),
    }
    if group > 1:
        peers["cuDNN, repeated"] = lambda: sdpa(SDPBackend.CUDNN_ATTENTION, True)
    return peers


def _flex(new: Inputs, q: Tensor, k: Tensor, v: Tensor, window: int, ends: Tensor | None) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[2]
    places = torch.arange(T, device=new.device)
    sequence_T = torch.zeros_like(places) if ends is None else torch.searchsorted(ends, places, right=True)

    def visible(_b: Tensor, _h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        near = (s <= t) & (sequence_T[s] == sequence_T[t])
        return near & (t - s <= window) if window else near

    mask = create_block_mask(visible, None, None, T, T, device=new.device)
    fast = torch.compile(flex_attention, dynamic=False)
    return lambda: fast(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _by_sequences(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, ends: Tensor | None) -> Tensor:
    """torch's FlashAttention over packed sequences; [B, H, T, D] in and out."""
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = q.shape
    if ends is None:
        ends = torch.arange(0, (B + 1) * T, T, device=q.device)
    ends = ends.to(torch.int32)
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        options["window_size"] = (window or -1, 0 if causal else -1)
    elif window:
        raise ValueError(f"torch {torch.__version__} has no window in varlen_attn")
    else:
        options["is_causal"] = causal
    call: Any = varlen_attn  # its signature differs from release to release
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    o_NHD: Tensor = call(*packed, ends, ends, T, T, **options)
    return o_NHD.view(B, T, *o_NHD.shape[1:]).transpose(1, 2)


def moe_peers(
    new: Inputs, x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> dict[str, Forward]:
    """A loop over experts on cuBLAS, as transformers has it, and torch's grouped product."""
    if not new.on_gpu:
        return {}

    def loop() -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(len(gate)):
            rows, slots = torch.where(ids == expert)
            part = x[rows]
            h = F.silu(F.linear(part, gate[expert])) * F.linear(part, up[expert])
            y = y.index_add(0, rows, F.linear(h, down[expert]) * weights[rows, slots, None])
        return y

    return {"grouped_mm": grouped_experts(x, ids, weights, gate, up, down), "loop, cuBLAS": loop}


def grouped_experts(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Forward:
    """torch's grouped product over sorted pairs of token and slot; nothing waits for the device."""

    def grouped() -> Tensor:
        of_pairs, order = ids.flatten().sort(stable=True)
        rows = order // ids.shape[1]
        experts = torch.arange(len(gate), device=ids.device)
        ends = torch.searchsorted(of_pairs, experts, right=True, out_int32=True)
        product: Any = F.grouped_mm  # new in torch 2.10
        part = x[rows]
        h = F.silu(product(part, gate.mT, offs=ends)) * product(part, up.mT, offs=ends)
        out = product(h, down.mT, offs=ends) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, rows, out)

    return grouped
