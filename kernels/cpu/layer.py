"""Decoder layers of Llama's shape on a CPU, described for compiled steps (`step.py`).

    x += o(attention(norm(x)))      with RoPE, optional head norms, the write into the paged cache
    x += down(activation(gate(norm(x))) up(norm(x)))

All is fp32 but weights (`projection.py`) and the cache (fp32, bf16, or int8 with a scale a slot and head).

Shapes: C model width, H query heads, K key/value heads, D head dimension, F feed-forward width, P blocks of S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trine.kernels.cpu.attention import DTYPES as CACHE_DTYPES
from trine.kernels.cpu.attention import pool_arguments
from trine.kernels.cpu.codes import LANES
from trine.kernels.cpu.compiled import address, available, single, why_not
from trine.kernels.cpu.projection import BFLOAT16, FLOAT32, INT8, AnyProjection, LanesProjection

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_CACHE_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


@dataclass(frozen=True, slots=True)
class Cache:
    """The pools of one layer, [P, S, K, D], and the scales [P, S, K] of pools of int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class DecodeLayer:
    """One layer: its weights and pools as arrays, made once. The tensors' memory is used, not copied."""

    def __init__(
        self,
        *,
        attention_norm_C: Tensor,
        mlp_norm_C: Tensor,
        qkv: AnyProjection,
        out: AnyProjection,
        gate_up: AnyProjection,
        down: AnyProjection,
        cache: Cache,
        num_heads: int,
        q_norm_D: Tensor | None = None,
        k_norm_D: Tensor | None = None,
        eps: float = 1e-6,
        unit_offset: bool = False,
        activation: str = "silu",
        interleaved: bool = False,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> None:
        """`qkv`, `gate_up`: joined rows, in this order. Options as of `paged_attention` and `write_kv`.

        Raises ValueError for what does not fit, RuntimeError where Numba is not available.
        """
        if not available():
            raise RuntimeError(f"compiled layers cannot be used here: {why_not()}")
        K, D = _check_cache(cache)
        C, F = len(attention_norm_C), gate_up.outputs // 2
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; supported are {', '.join(_ACTIVATIONS)}")
        if window is not None and window < 0:
            raise ValueError(f"window is {window}; give the number of keys before a token's own, or None")
        if (q_norm_D is None) != (k_norm_D is None):
            raise ValueError("q_norm and k_norm go together; give both or neither")
        if num_heads % K or qkv.outputs != (num_heads + 2 * K) * D:
            rows = (num_heads + 2 * K) * D
            raise ValueError(f"qkv has {qkv.outputs} rows; expected {rows} for {num_heads} heads")
        if out.outputs != C or down.outputs != C or len(mlp_norm_C) != C:
            widths = f"{out.outputs}, {down.outputs}, {len(mlp_norm_C)}"
            raise ValueError(f"out, down and mlp_norm give {widths}, not {C}")
        for name, x, size in (("q_norm", q_norm_D, D), ("k_norm", k_norm_D, D), ("sinks", sinks_H, num_heads)):
            if x is not None and tuple(x.shape) != (size,):
                raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({size},)")
        if isinstance(gate_up, LanesProjection) and F % LANES:
            raise ValueError(f"gate_up has {F} rows of gate; tiles of codes need a multiple of {LANES}")
        self.head_dim, self.width, self.window = D, C, -1 if window is None else window
        self.num_heads, self.feed, self.activation = num_heads, F, activation
        # For products by torch: what the norms multiply by, and eps.
        self.norms = tuple(norm.float() + float(unit_offset) for norm in (attention_norm_C, mlp_norm_C))
        self.eps = eps
        self.projections = (qkv, out, gate_up, down)
        for name, projection, inputs in (
            ("qkv", qkv, C), ("out", out, num_heads * D), ("gate_up", gate_up, C), ("down", down, F),
        ):  # fmt: skip
            projection.check(name, inputs)
        from trine.kernels.cpu.step_loops import attend_address

        self.keep: list[Any] = []
        norms = [single(x) for x in (attention_norm_C, mlp_norm_C, q_norm_D, k_norm_D)]
        pools, layout = pool_arguments(cache.k, cache.v, cache.k_scale, cache.v_scale)
        sinks = single(sinks_H)
        self.keep += (*norms, *pools, sinks)
        k, v, k_scale, v_scale = pools
        self.fields = [
            num_heads, K, D, _ACTIVATIONS[activation], interleaved, self.window, address(sinks),
            *(address(norm) for norm in norms), attend_address(_CACHE_KINDS[cache.k.dtype]),
            address(k), k.size, address(v), v.size, address(k_scale), address(v_scale),
            k_scale.size, layout[0], *layout[2:],
            *(field for projection in self.projections for field in projection.fields(self.keep)),
        ]  # fmt: skip
        self.options = [eps, float(unit_offset), D**-0.5 if scale is None else scale, softcap or 0.0]


def _check_cache(cache: Cache) -> tuple[int, int]:
    """(key/value heads, head dimension) of pools that the loops can use; ValueError for others."""
    k, v = cache.k, cache.v
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or k.dtype not in CACHE_DTYPES:
        kinds = f"{k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
        raise ValueError(f"the caches are {kinds}; expected two [P, S, K, D] alike, of fp32, bf16 or int8")
    if any(x.stride(3) != 1 or x.stride(0) != x.shape[1] * x.stride(1) for x in (k, v)):
        raise ValueError(
            f"the caches have strides {k.stride()}, {v.stride()}; slots must lie at one stride, heads dense"
        )
    for name, scales in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if (scales is not None) != (k.dtype == torch.int8):
            raise ValueError(f"{name} is {'missing for' if scales is None else 'given with'} caches of {k.dtype}")
        if scales is not None and (
            scales.dtype != torch.float32 or scales.shape != k.shape[:3] or not scales.is_contiguous()
        ):
            raise ValueError(f"{name} is {scales.dtype} {tuple(scales.shape)}; expected contiguous float32 [P, S, K]")
    return k.shape[2], k.shape[3]
